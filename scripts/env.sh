# shellcheck shell=bash disable=SC2034
# Sourced by the run scripts: how Python is started on this machine, and what a stage's own flags say.

if [ -z "${PYTHON:-}" ]; then
  PYTHON=python
  [ ! -x .venv/bin/python ] || PYTHON=.venv/bin/python
  "$PYTHON" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("trl"))' || {
    echo "error: $PYTHON has no packages of requirements.txt: see The stages in README.md, or set PYTHON" >&2
    exit 2
  }
fi

# One process per GPU; one process on a CPU. GPUS=0,1 picks some of them.
[ -n "${GPUS:-}" ] && export CUDA_VISIBLE_DEVICES="$GPUS"
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then  # set to nothing: no GPU
  processes=$(awk -F, '{print NF}' <<<"$CUDA_VISIBLE_DEVICES")
else
  processes=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
fi
# More than one machine: NNODES=2 NODE_RANK=0|1 MASTER_ADDR=host-of-rank-0 on each, with the same folders on both.
LAUNCH=("$PYTHON")
if [ "${NNODES:-1}" -gt 1 ]; then
  : "${NODE_RANK:?says which of the $NNODES machines this is, from 0}" "${MASTER_ADDR:?names the machine of rank 0}"
  LAUNCH=("$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR"
    --master_port "${MASTER_PORT:-29500}" --nproc_per_node "$((processes > 0 ? processes : 1))")
elif [ "$processes" -gt 1 ]; then
  LAUNCH=("$PYTHON" -m torch.distributed.run --nproc_per_node "$processes")
fi

# glibc hands every freed activation back to the kernel and pays page faults to get it again; keeping it made training
# steps on a 2-core machine 20-40% faster. Its caches of small pieces then hold large holes apart: without them a stage
# peaks 10-30% lower, in the same time.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000
export GLIBC_TUNABLES=glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0
# tcmalloc, where it is installed, leaves fewer still and is faster; where it is not, the loader says so.
if [[ "${LD_PRELOAD:-}" != *malloc* ]] && [ -z "$(LD_PRELOAD=libtcmalloc_minimal.so.4 bash -c : 2>&1)" ]; then
  export LD_PRELOAD="libtcmalloc_minimal.so.4${LD_PRELOAD:+:$LD_PRELOAD}"
  export TCMALLOC_RELEASE_RATE=0 TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD=1000000000000  # keep freed memory; no reports
fi
export TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_TELEMETRY=1 HF_UPDATE_DOWNLOAD_COUNTS=0

# supervise command...: run it, and hand on to it the SIGTERM that this script gets, as docker stop and batch systems send
# one. bash alone would die of it, or, as a container's first process, not heed it; the command saves a checkpoint.
supervise() {
  local child ended told=0
  trap : INT  # Ctrl-C reaches the command without us, and this waits for its end
  (trap - INT QUIT; exec "$@") <&0 &
  child=$!
  trap 'trap : TERM; told=143; kill -TERM "$child" 2>/dev/null || :' TERM  # once: torchrun bears no third one
  while
    wait "$child" && ended=0 || ended=$?  # above 128 where a signal came in between
    kill -0 "$child" 2>/dev/null
  do :; done
  trap - INT TERM
  [ "$ended" -ne 0 ] || ended=$told  # a command that was at its end: what comes behind it is not wanted
  return "$ended"
}

# flag_value --flag default "$@": the last value that "$@" gives to --flag, else the default.
flag_value() {
  local flag=$1 value=$2
  shift 2
  while [ $# -gt 0 ]; do
    case ${1//-/_} in  # argparse takes --output-dir for --output_dir
      "${flag//-/_}") value=${2:-} ;;
      "${flag//-/_}"=*) value=${1#*=} ;;
    esac
    shift
  done
  printf '%s' "$value"
}

# flag_is_on --flag "$@": whether "$@" gives it, and not with one of the words that argparse takes for no.
flag_is_on() {
  case $(flag_value "$1" no "${@:2}" | tr '[:upper:]' '[:lower:]') in false | f | no | n | 0) return 1 ;; esac
}

# read_flags "$@": MODEL, OUTPUT, TRAIN and VALIDATION as its flags have them, and MERGED where that is empty. A TRAIN
# that holds train/ and validation/ is both; one that does not, with no VALIDATION, loses a share of its records to
# evaluation.
read_flags() {
  local train hub
  train=$(flag_value --train_file_dir "" "$@") hub=$(flag_value --dataset_name "" "$@")
  [ -z "$train$hub" ] || { TRAIN=$train VALIDATION=""; }  # held-out records of other data would say nothing of these
  VALIDATION=$(flag_value --validation_file_dir "${VALIDATION:-}" "$@")
  if [ -n "$TRAIN" ]; then
    [ -n "$VALIDATION" ] || [ ! -d "$TRAIN/validation" ] || VALIDATION=$TRAIN/validation
    [ ! -d "$TRAIN/train" ] || TRAIN+=/train
    : "${VALIDATION:=$TRAIN}"
  fi
  OUTPUT=$(flag_value --output_dir "$OUTPUT" "$@")
  : "${MERGED:=${OUTPUT%/}-merged}"
  MODEL=$(flag_value --model_name_or_path "$MODEL" "$@")
  if [ "$MODEL" -ef "$MERGED" ]; then  # said before the training, not by the merge behind it
    echo "error: $MODEL is the base, and $MERGED, where the merged model goes: set OUTPUT or MERGED to another folder" >&2
    exit 2
  fi
}

# merge_stage base adapter merged "$@": does nothing where all weights were trained and there is no adapter, nor where
# the stage's flags only looked. Machine 0 merges.
merge_stage() {
  local base=$1 adapter=$2 merged=$3 code=False
  shift 3
  case " $* " in *" --help "* | *" -h "*) return ;; esac
  if flag_is_on --plan "$@" || flag_is_on --preview "$@"; then return; fi
  if flag_is_on --trust_remote_code "$@"; then code=True; fi
  if [ "${NODE_RANK:-0}" -gt 0 ]; then
    [ ! -f "$adapter/adapter_config.json" ] || echo "waiting for machine 0 to merge into $merged"
    until [ "$merged/merge.json" -nt "$adapter/all_results.json" ] || [ ! -f "$adapter/adapter_config.json" ]; do
      # one that is older is of an earlier run, and machine 0 has not come to remove it yet
      [ ! "$adapter/merge_failed" -nt "$adapter/all_results.json" ] || { echo "error: the merge failed on machine 0, see its log" >&2; exit 1; }
      sleep 2
    done
  elif [ -f "$adapter/adapter_config.json" ]; then
    rm -f "$adapter/merge_failed"
    supervise "$PYTHON" merge_peft_adapter.py --base_model_name_or_path "$base" --peft_model_path "$adapter" --trust_remote_code "$code" --output_dir "$merged" || {
      ended=$?
      [ "${NNODES:-1}" -eq 1 ] || touch "$adapter/merge_failed"  # for those that wait
      exit "$ended"
    }
  elif [ -f "$adapter/config.json" ]; then
    echo "$adapter holds a whole model: nothing to merge"
  else
    echo "error: $adapter holds neither an adapter nor a model: has another command cleared it?" >&2
    exit 1
  fi
}
