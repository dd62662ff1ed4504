"""Build the sample data of every training stage out of the hand-written knowledge base.

    python data/knowledge/build.py

Reads:  data/knowledge/*.jsonl, one medical condition a line, the English files before the Chinese one,
        data/knowledge/topics/*.jsonl, documents on medicines, tests, first aid and the like,
        and data/knowledge/phrases.json, the questions, headings and non-answers
Writes: data/{pretrain,finetune,reward,prompts}/{train,validation}/*.jsonl, the same bytes at every run
"""

import json
import random
import re
from pathlib import Path

KNOWLEDGE = Path(__file__).resolve().parent
DATA = KNOWLEDGE.parent

FIELDS = ("what", "symptoms", "causes", "treatment", "doctor", "prevention")

# (with headings?, paragraphs): paragraphs of two fields have no heading that would fit both
LAYOUTS = (
    (True, (("what",), ("symptoms",), ("causes",), ("treatment",), ("doctor",), ("prevention",))),
    (True, (("what",), ("causes",), ("symptoms",), ("doctor",), ("treatment",), ("prevention",))),
    (False, (("what",), ("symptoms",), ("causes",), ("treatment",), ("doctor",), ("prevention",))),
    (False, (("what", "causes"), ("symptoms",), ("treatment", "doctor"), ("prevention",))),
    (False, (("what",), ("causes", "prevention"), ("symptoms", "doctor"), ("treatment",))),
)

# Phrases by language; {name} stands for the condition. No phrasing makes it the subject of a present-tense verb, as
# some names are plural. PROMPTS, the questions of the RL stage, are in other words than QUESTIONS, so that the
# policy meets questions it was not tuned on. EVASIVE and RAMBLING run from short to long, so that a rejected answer of
# any length can be found (see `nearest`).
PHRASES = json.loads((KNOWLEDGE / "phrases.json").read_text("utf-8"))
HEADINGS, QUESTIONS, PROMPTS = PHRASES["headings"], PHRASES["questions"], PHRASES["prompts"]
SYSTEMS, TASKS = PHRASES["systems"], PHRASES["tasks"]
EVASIVE, RAMBLING = PHRASES["evasive"], PHRASES["rambling"]


def load(pattern):
    """Return the records of the knowledge files that fit, in the order of their names."""
    lines = [line for path in sorted(KNOWLEDGE.glob(pattern)) for line in path.read_text("utf-8").splitlines()]
    return [json.loads(line) for line in lines if line.strip()]


def ask(condition, field, rng, phrasings=QUESTIONS):
    """Return one of the phrasings of the question that `field` answers."""
    return rng.choice(phrasings[condition["language"]][field]).format(name=condition["name"])


def document(condition, rng):
    """Return an encyclopaedia-like text: the name as title, then the six fields in one of the layouts."""
    language = condition["language"]
    headed, paragraphs = rng.choice(LAYOUTS)
    title = re.sub(r"^(an?|the) ", "", condition["name"])
    parts = [title[0].upper() + title[1:]]
    for fields in paragraphs:
        text = (" " if language == "en" else "").join(condition[field] for field in fields)
        parts.append(rng.choice(HEADINGS[language][fields[0]]) + "\n" + text if headed else text)
    return {"text": "\n\n".join(parts)}


def instructions(condition, rng):
    """Return five questions on different fields; about one in six stands in `input`, under a general task."""
    records = []
    for field in rng.sample(FIELDS, 5):
        record = {"instruction": ask(condition, field, rng), "input": "", "output": condition[field]}
        if rng.random() < 1 / 6:
            record["input"] = record["instruction"]
            record["instruction"] = rng.choice(TASKS[condition["language"]])
        records.append(record)
    return records


def dialogues(condition, rng):
    """Return one or two lists of (question, answer) turns: a patient's story and, half the time, a reader's talk."""
    turns = [condition["patient"], *condition["followups"]]
    patient, *followups = [(turn["question"], turn["answer"]) for turn in turns]
    field = rng.choice(("causes", "treatment", "doctor", "prevention"))
    story = [patient, (ask(condition, field, rng), condition[field])] + followups[: rng.randrange(3)]
    field = rng.choice(("what", "symptoms"))
    talk = [(ask(condition, field, rng), condition[field])] + rng.sample(followups, rng.choice((1, 2)))
    return [story, talk] if rng.random() < 0.5 else [story]


def with_roles(turns, names, language, rng):
    """Flatten turns into (role, text) pairs, one dialogue in three with a system text before them.

    names: what the format calls the system, the user and the assistant.
    """
    system, user, assistant = names
    pairs = [(system, rng.choice(SYSTEMS[language]))] if rng.random() < 1 / 3 else []
    for question, answer in turns:
        pairs += [(user, question), (assistant, answer)]
    return pairs


def sharegpt(turns, language, rng):
    pairs = with_roles(turns, ("system", "human", "gpt"), language, rng)
    return {"conversations": [{"from": role, "value": text} for role, text in pairs]}


def openai(turns, language, rng):
    pairs = with_roles(turns, ("system", "user", "assistant"), language, rng)
    return {"messages": [{"role": role, "content": text} for role, text in pairs]}


def prompts(condition, rng):
    return [{"prompt": ask(condition, field, rng, PROMPTS)} for field in rng.sample(FIELDS, 5)]


def pair(condition, field, rejected, kind, rng):
    """Return a preference record; about one in six comes after an earlier turn on another field."""
    history = []
    if rng.random() < 1 / 6:
        earlier = rng.choice([other for other in FIELDS if other != field])
        history = [[ask(condition, earlier, rng), condition[earlier]]]
    question = ask(condition, field, rng)
    return {
        "system": "",
        "history": history,
        "question": question,
        "response_chosen": condition[field],
        "response_rejected": rejected,
        "kind": kind,
    }


def nearest(candidates, chosen, longer, rng):
    """Return the three candidates nearest in length to `chosen` among the longer ones, or among the shorter ones."""
    fitting = [text for text in candidates if (len(text) > len(chosen) if longer else len(text) < len(chosen))]
    return sorted(fitting, key=lambda text: (abs(len(text) - len(chosen)), rng.random()))[:3]


def phrases(pool, condition):
    """Return the pool's phrases about the condition; validation gets its own third, so that none is known by heart."""
    held_out = condition["split"] == "validation"
    return [text.format(name=condition["name"]) for n, text in enumerate(pool) if (n % 3 == 0) == held_out]


def gap(record):
    """Return by how many characters the chosen answer is longer than the rejected one."""
    return len(record["response_chosen"]) - len(record["response_rejected"])


def false_pairs(conditions, kind, key, rng):
    """Return a pair for every false answer under `key`; the knowledge base sees to it that length does not tell."""
    return [pair(c, field, text, kind, rng) for c in conditions for field, text in c[key].items()]


def useless_pairs(conditions, rng):
    """Return three pairs a condition whose rejected answers are not false, but do not answer the question.

    Longer and shorter rejected answers alternate within each kind, so that a reward model learns nothing from length.
    """
    records = []
    for n, condition in enumerate(conditions):
        rejected = {
            "evasive": phrases(EVASIVE[condition["language"]], condition),
            "off_topic": [other[field] for other in conditions if other is not condition for field in FIELDS],
            "rambling": phrases(RAMBLING[condition["language"]], condition),
        }
        for m, (kind, texts) in enumerate(rejected.items()):
            longer = (n + m) % 2 == 0
            options = [(field, text) for field in FIELDS for text in nearest(texts, condition[field], longer, rng)]
            records += [pair(condition, *choice, kind, rng) for choice in rng.sample(options, min(1, len(options)))]
    return records


def longer_wins(records):
    """Return the accuracy of the rule "the longer answer is the better one"; a tie counts one half."""
    return sum((gap(record) > 0) + (gap(record) == 0) / 2 for record in records) / len(records)


def summary(records):
    """Return the accuracy of "longer wins" for preference records, over all and by kind."""
    kinds = dict.fromkeys(record["kind"] for record in records)
    scores = [f"{kind} {longer_wins([r for r in records if r['kind'] == kind]):.2f}" for kind in sorted(kinds)]
    return f"  longer wins {longer_wins(records):.3f} ({', '.join(scores)})"


def write(stage, split, name, records, rng):
    """Shuffle the records, write them to data/{stage}/{split}/{name}, and print a line about the file."""
    path = DATA / stage / split / name
    rng.shuffle(records)
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8", newline="\n")
    mean = sum(map(len, lines)) / len(lines)
    extra = summary(records) if stage == "reward" else ""
    print(f"{path.relative_to(DATA.parent).as_posix():52} {len(lines):4} rows, mean {mean:4.0f} characters{extra}")


def build(conditions, split, language, rng):
    """Write the files of one split and language."""
    pick = [c for c in conditions if c["split"] == split and c["language"] == language]
    if not pick:  # a knowledge base of one's own may be in one language
        return
    multi_turn, form = ("en_conversations", sharegpt) if language == "en" else ("zh_messages", openai)
    talks = [form(turns, language, rng) for c in pick for turns in dialogues(c, rng)]
    false = false_pairs(pick, "wrong_fact", "wrong", rng) + false_pairs(pick, "unsafe", "unsafe", rng)
    write("pretrain", split, f"{language}.jsonl", [document(c, rng) for c in pick], rng)
    write("finetune", split, f"{language}_instructions.jsonl", [r for c in pick for r in instructions(c, rng)], rng)
    write("finetune", split, f"{multi_turn}.jsonl", talks, rng)
    write("reward", split, f"{language}.jsonl", false + useless_pairs(pick, rng), rng)
    write("prompts", split, f"{language}.jsonl", [r for c in pick for r in prompts(c, rng)], rng)


def main():
    rng, conditions, topics = random.Random(0), load("*.jsonl"), load("topics/*.jsonl")
    for split in ("train", "validation"):
        for language in ("en", "zh"):
            build(conditions, split, language, rng)
    for split in ("train", "validation"):
        for language in ("en", "zh"):
            texts = [{"text": t["text"]} for t in topics if t["split"] == split and t["language"] == language]
            if texts:
                write("pretrain", split, f"{language}_topics.jsonl", texts, rng)


if __name__ == "__main__":
    main()
