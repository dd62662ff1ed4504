"""inference.py's page in the browser: models that answer side by side, and votes between their answers."""

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from arguments.atomic import append_lines
from arguments.command_line import UserError
from arguments.predictions import writable


def ask_all(question: str, histories: list[list[dict]], answerers: list) -> Iterator[list[list[dict]]]:
    """The conversations with the question and, piece by piece, the models' answers to it, one model after another."""
    histories = [[*messages, {"role": "user", "content": question}] for messages in histories]
    yield list(histories)
    for i, answerer in enumerate(answerers):
        asked = histories[i]
        for text in answerer.stream(asked):
            histories[i] = [*asked, {"role": "assistant", "content": text}]
            yield list(histories)


def vote(path: Path, histories: list[list[dict]], best: int) -> int:
    """Write the best answer and each other one as a preference pair for stage 3; returns the number of pairs.

    Both answers of a pair reply to the same conversation and differ: other answers make none.
    """
    *prompt, chosen = histories[best]
    others = [messages[-1]["content"] for messages in histories if messages[:-1] == prompt]
    rejected = [text for text in dict.fromkeys(others) if text != chosen["content"]]
    append_lines(path, [{"prompt": prompt, "chosen": chosen["content"], "rejected": text} for text in rejected])
    return len(rejected)


def serve(args, names: list[str], load: Callable) -> None:
    """A page on localhost: the models `names`, that `load` makes answerers of, answer side by side; after a vote they
    go on from the answer that won.

    `args` are the flags of inference.py.

    Raises:
        UserError: before a model is loaded, when there is no gradio, the port is taken or no vote can be written.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise UserError("--web needs gradio: pip install gradio") from error
    check_port(args.port)
    votes = writable("votes_file", args.votes_file)
    answerers = [load(name) for name in names]
    start = [[{"role": "system", "content": args.system}] if args.system else [] for _ in names]

    def shown(histories):
        return [histories, *([m for m in messages if m["role"] != "system"] for messages in histories)]

    def ask(question, histories):
        for found in ask_all(question, histories, answerers) if question.strip() else ():
            yield ["", *shown(found)]

    def choose(best, histories):
        if not histories[best][-1:] or histories[best][-1]["role"] != "assistant":
            raise gradio.Error("Ask first, then vote.")
        pairs = vote(votes, histories, best)
        gradio.Info(f"{pairs} preference pairs in {args.votes_file}; all go on from the answer that won.")
        return shown([histories[best]] * len(names))

    with gradio.Blocks(title="Side by side", analytics_enabled=False, fill_width=True) as page:
        state = gradio.State(start)
        with gradio.Row():
            columns = [gradio.Chatbot(label=name, height="65vh", buttons=["copy_all"]) for name in names]
        question = gradio.Textbox(placeholder="Ask ...", show_label=False, autofocus=True)
        with gradio.Row():
            for i, name in enumerate(names if len(names) > 1 else ()):
                gradio.Button(f"{Path(name).name} is best").click(
                    lambda histories, i=i: choose(i, histories), state, [state, *columns]
                )
            clear = gradio.Button("Clear")
        gradio.on([clear.click, *(column.clear for column in columns)], lambda: shown(start), None, [state, *columns])
        question.submit(ask, [question, state], [question, state, *columns])
    page.launch(server_name="127.0.0.1", server_port=args.port, share=False)


def check_port(port: int) -> None:
    """See that a page can be served at this port, before models load for it."""
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: an ended one frees it at once
        try:
            tried.bind(("127.0.0.1", port))
        except OSError as error:
            raise UserError(f"--port {port} is not available ({error.strerror}): name another") from error
