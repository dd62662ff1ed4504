"""Data files: finding them, and reading their records, each with its place.

A record is what the file holds, usually a dict; what cannot be read comes as a BadRecord in its place, so that the
rest of the file is still read.
"""

import codecs
import contextlib
import csv
import gzip
import io
import itertools
import json
import re
import shutil
import statistics
import sys
import tempfile
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
from loguru import logger

from arguments.atomic import is_json

INVISIBLE = " \t\r\n\u3000\u200b\ufeff"
BLANK = {"Zs", "Zl", "Zp", "Cc", "Cf"}  # categories of spaces, controls and marks without a shape
CHINESE = re.compile("[\u3400-\u9fff]")
WIDE = re.compile("[^\x00-\x7f\ufffd]+")
COMMON = "的一是不了在人有我他中大上"  # written alike in simplified and traditional Chinese
ACCENT = re.compile(r"[a-z][\u3400-\u9fff](?![^\x00-\x7f])")  # as GB18030 reads that of a word in Latin-1
BETWEEN_RECORDS = re.compile(rf"[{INVISIBLE},]*")
TEXT_SUFFIXES = (".txt", ".json", ".jsonl", ".csv")
SUFFIXES = tuple(suffix + packed for packed in ("", ".gz") for suffix in (*TEXT_SUFFIXES, ".parquet"))
SENTENCE_ENDS = tuple(".!?:;\"')\u3002\uff01\uff1f\u2026\uff1a\uff1b\u201d\uff09")
csv.field_size_limit(sys.maxsize)
noted: set[Path] = set()  # folders of which the log names a file in GB18030: they may hold thousands


class BadRecord(ValueError):
    """A record that cannot be used: what was found and what was expected, and its text where it was not read."""

    def __init__(self, reason: str, raw: str = ""):
        super().__init__(reason)
        self.raw = raw


def find_files(folder: str) -> list[Path]:
    """Every readable data file under `folder` (searched recursively), or `folder` itself when it is a file."""
    return [path for path in all_files(folder) if path.name.lower().endswith(SUFFIXES) and path.is_file()]


def other_files(folder: str) -> list[Path]:
    """What find_files leaves out: other names, and links to nothing."""
    return [path for path in all_files(folder) if not (path.name.lower().endswith(SUFFIXES) and path.is_file())]


def all_files(folder: str | Path, above: tuple[Path, ...] = ()) -> list[Path]:
    """All files but hidden ones below the folder (a notebook's old copies, what macOS puts beside each file).

    Links to folders are followed, except those that lead back to one `above`; links to nothing count as files.

    Raises:
        PermissionError: for a folder that cannot be listed.
    """
    path = Path(folder)
    if path.is_file() or (above and not path.exists()):
        return [path]
    if not path.is_dir() or path.resolve() in above:
        return []
    shown = sorted(inner for inner in path.iterdir() if not inner.name.startswith("."))
    return [file for inner in shown for file in all_files(inner, (*above, path.resolve()))]


def read_file(path: Path, by_line: bool = False) -> Iterator[tuple[str, object]]:
    """Yield (file:line, record) for each record; a record of a .txt is {"text": document}, or line with `by_line`.

    Files are read lazily, a line at a time; only a JSON array is held in memory as a whole.
    """
    try:
        name = path.name.lower().removesuffix(".gz")
        records = read_parquet(path) if name.endswith(".parquet") else read_text(path, by_line)
        yield from ((f"{path}:{number}", record) for number, record in records)
    except (BadRecord, OSError, EOFError, zlib.error, csv.Error, pyarrow.ArrowException) as error:
        yield str(path), BadRecord(f"cannot be read: {error}")


def read_parquet(path: Path) -> Iterator[tuple[int, dict]]:
    """(row, record) of a .parquet file, whose rows are counted from 1."""
    with pyarrow.parquet.ParquetFile(unpacked(path) if gzipped(path) else path) as file:
        batches = file.iter_batches(batch_size=1000)
        try:
            yield from enumerate((record for batch in batches for record in batch.to_pylist()), 1)
        except pyarrow.ArrowException:  # the file is damaged; some are ValueErrors, too
            raise
        except (ValueError, OverflowError, LookupError) as error:  # no text, the year 10000, an unknown time zone
            raise BadRecord(f"Python has no such value ({error}): convert its column, or leave it out") from error


def unpacked(path: Path):
    """A gzipped file's content in a temporary file: .parquet is read from its end, to which gzip cannot seek."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 (closed when nothing holds it any more: ParquetFile leaves it open)
    with gzip.open(path) as packed:
        shutil.copyfileobj(packed, file)
    return file


def read_text(path: Path, by_line: bool) -> Iterator[tuple[int, object]]:
    """(line, record) of a .txt, .csv, .json or .jsonl file; the last two are told apart by what they hold."""
    encoding, name = encoding_of(path), path.name.lower().removesuffix(".gz")
    with io.TextIOWrapper(open_bytes(path), encoding=encoding, newline="\n") as file:
        if name.endswith(".csv"):
            yield from read_csv(file)
        elif name.endswith(".txt"):
            yield from read_documents(file, by_line)
        elif spreads_over_lines(path, encoding):
            yield from read_json(file.read())
        else:
            yield from read_json_lines(file)


def gzipped(path: Path) -> bool:
    return path.name.lower().endswith(".gz")


def open_bytes(path: Path):
    return gzip.open(path) if gzipped(path) else path.open("rb")


def encoding_of(path: Path) -> str:
    """The encoding that decodes all of the file: UTF-8, with or without BOM, before GB18030."""
    faults = []
    for encoding in ("utf-8-sig", "gb18030"):
        fault = undecodable(path, encoding)
        if fault is None:
            if faults:
                refuse_damaged(path, *faults[0])
                refuse_western(path)
                refuse_big5(path)
                if path.parent not in noted:
                    logger.info(f"{path} is not UTF-8, and read as GB18030: --preview shows whether it is")
                noted.add(path.parent)
            return encoding
        faults.append(fault)
    line, held = max(faults)  # the encoding that failed later is likelier the file's
    raise BadRecord(f"neither UTF-8 nor GB18030 text: line {line} holds {held}")


def refuse_damaged(path: Path, line: int, held: bytes) -> None:
    """Refuse a file most of whose characters beyond ASCII are whole in UTF-8, for the first of those that are not.

    In GB18030 up to half of them are by chance.
    """
    whole, broken = 0, 0
    with io.TextIOWrapper(open_bytes(path), encoding="utf-8", errors="replace") as file:
        for text in file:
            broken += text.count("\ufffd")
            whole += sum(map(len, WIDE.findall(text)))
    if whole > 3 * broken:
        raise BadRecord(
            f"UTF-8 but for some bytes: line {line} holds {held}. Mend them (if the file is GB18030: iconv -f gb18030 "
            "-t utf-8)"
        )


def refuse_western(path: Path) -> None:
    """Refuse a file most of whose Chinese characters, read as GB18030, stand alone in words of Latin letters."""
    accents, chinese = [], 0
    with io.TextIOWrapper(open_bytes(path), encoding="gb18030") as file:
        for line in file:
            accents += (line[max(0, found.start() - 9) : found.end() + 9].strip() for found in ACCENT.finditer(line))
            chinese += len(CHINESE.findall(line))
    if len(accents) > chinese / 2:
        raise BadRecord(
            f"not UTF-8, but likely Windows-1252 (Latin-1): read as GB18030 it holds {accents[0]!r}. Convert it to "
            "UTF-8 (iconv -f cp1252 -t utf-8; if that is right: iconv -f gb18030 -t utf-8)"
        )


def refuse_big5(path: Path) -> None:
    """Refuse a file in whose start common Chinese characters are more often found read as Big5 than as GB18030."""
    with open_bytes(path) as file:
        start = file.read(1 << 20)
    read = {encoding: start.decode(encoding, "ignore") for encoding in ("big5", "gb18030")}
    found = {encoding: sum(map(text.count, COMMON)) for encoding, text in read.items()}
    if found["big5"] > found["gb18030"]:
        raise BadRecord(
            f"not UTF-8, but likely Big5: read as GB18030 it begins with {read['gb18030'][:40]!r}. Convert it to "
            "UTF-8 (iconv -f big5 -t utf-8; if that is right: iconv -f gb18030 -t utf-8)"
        )


def is_blank(text: str) -> bool:
    """Whether the text shows nothing."""
    return all(unicodedata.category(character) in BLANK for character in text)


def undecodable(path: Path, encoding: str) -> tuple[int, bytes] | None:
    """Line and bytes of the first place that the encoding cannot decode; None if there is none."""
    decoder, line = codecs.getincrementaldecoder(encoding)(), 1
    with open_bytes(path) as file:
        while chunk := file.read(1 << 20):
            fault = fault_in(decoder, chunk)
            if fault:
                return line + fault[0], fault[1]
            line += chunk.count(b"\n")
    fault = fault_in(decoder, b"", final=True)
    return fault and (line + fault[0], fault[1])


def fault_in(decoder, chunk: bytes, final: bool = False) -> tuple[int, bytes] | None:
    """Line breaks before the first undecodable bytes in the chunk, and these bytes; None if there are none."""
    try:
        decoder.decode(chunk, final)
    except UnicodeDecodeError as error:
        return error.object.count(b"\n", 0, error.start), error.object[error.start : error.end]
    return None


def spreads_over_lines(path: Path, encoding: str) -> bool:
    """Whether the file begins an array, or a record of more than its first line: open there, and not within a text."""
    with io.TextIOWrapper(open_bytes(path), encoding=encoding) as file:
        lines = (found for line in file if (found := line.strip(INVISIBLE)))
        first, second = next(lines, ""), next(lines, "")
    if not second:
        return first.startswith("[")
    if first.startswith("["):
        return not is_json(first)
    return first.startswith("{") and first.endswith(tuple("{[,:}]")) and not (is_json(first) or is_json(second))


def read_csv(lines: Iterable[str]) -> Iterator[tuple[int, dict]]:
    """(line it ends on, record) of each row; the first row names the columns. Turns in JSON become lists.

    A quote that is not closed would turn the rest of the file into one cell: that is a bad record at its line.
    """
    reader = csv.DictReader(lines, strict=True)
    columns = len(reader.fieldnames or [])
    while True:
        start = reader.reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            last = reader.reader.line_num
            until = f"; the row reaches to line {last}" if last > start else ""
            yield start, BadRecord(f"its quotes do not come in pairs ({error}){until}")
            continue
        if None in record:
            yield reader.line_num, BadRecord(f"more cells than the {columns} columns of the first line")
            continue
        cells = {key.strip(INVISIBLE): cell for key, cell in record.items()}
        if not is_blank("".join(filter(None, cells.values()))):  # as spreadsheets leave at their end
            yield reader.line_num, {key: cell_value(key, cell) for key, cell in cells.items()}


def cell_value(column: str, cell: str | None):
    """A cell's text, or the turns or exchanges (`history`) that stand in it as JSON; an answer may be JSON, too."""
    if cell and cell.startswith("[[" if column == "history" else "[{"):
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(cell)
            if column == "history" or all(isinstance(turn, dict) and {"role", "from"} & set(turn) for turn in found):
                return found
    return cell


def read_documents(lines: Iterable[str], by_line: bool = False) -> Iterator[tuple[int, dict]]:
    """(line, {"text"}) of each line that holds a document, or, unless `by_line`, each paragraph of a wrapped file."""
    lines = iter(lines)
    head = list(itertools.islice(lines, 2000))
    numbered = enumerate(itertools.chain(head, lines), 1)
    if by_line or not is_hard_wrapped(head):
        yield from ((number, {"text": line}) for number, line in numbered if not is_blank(line))
        return
    for blank, group in itertools.groupby(numbered, key=lambda pair: is_blank(pair[1])):
        if not blank:
            numbers, texts = zip(*group, strict=True)
            yield numbers[0], {"text": unwrapped(texts)}


def is_hard_wrapped(lines: list[str]) -> bool:
    """Whether a .txt holds paragraphs (wrapped at a column, separated by blank lines), not one document a line.

    Wrapped lines are similar in length, at most 120 characters long, and mostly end inside a sentence.
    """
    texts = [line.strip(INVISIBLE) for line in lines]
    broken = [line for line, following in itertools.pairwise(texts) if line and following]
    apart = any(not line for line in texts[: len(texts) - 1])
    if not apart or len(broken) < 2 or max(map(len, broken)) > 120:
        return False
    inside_sentence = sum(not line.endswith(SENTENCE_ENDS) for line in broken)
    return inside_sentence > len(broken) / 2 and statistics.median(map(len, broken)) > 0.6 * max(map(len, broken))


def unwrapped(lines: Iterable[str]) -> str:
    """The lines of a paragraph as one, with a space between words but not between Chinese characters."""
    text = ""
    for line in (line.strip(INVISIBLE) for line in lines):
        wide = text and (ord(text[-1]) > 0x2E80 or ord(line[0]) > 0x2E80)
        text += line if wide or not text else " " + line
    return text


def read_json_lines(lines: Iterable[str]) -> Iterator[tuple[int, object]]:
    """(line, record) of each line that holds one."""
    for number, line in enumerate(lines, 1):
        line = line.strip(INVISIBLE)
        if line:
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:  # json.JSONDecodeError, a huge number, deep nesting
                yield number, BadRecord(f"not JSON ({error}): {line[:60]}", line)


def read_json(text: str) -> Iterator[tuple[int | str, object]]:
    """(line it starts on, record) of each record of a JSON array, or of records that follow one another.

    One behind others on the same line also has its number, "1, item 3".
    """
    decoder, position, line, counted = json.JSONDecoder(), BETWEEN_RECORDS.match(text).end(), 1, 0
    items, last = 0, None
    array = text.startswith("[", position)
    position += array
    while True:
        position = BETWEEN_RECORDS.match(text, position).end()
        line, counted = line + text.count("\n", counted, position), position
        if position == len(text) and not array:
            return
        if array and text.startswith("]", position):
            break
        try:
            record, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            yield getattr(error, "lineno", line), BadRecord(f"not JSON ({error}); the rest is not read")
            return
        items += 1
        yield f"{line}, item {items}" if line == last else line, record
        last = line
    behind = BETWEEN_RECORDS.match(text, position + 1).end()
    if behind < len(text):
        line += text.count("\n", counted, behind)
        yield line, BadRecord(f"text after the array's end: {text[behind : behind + 60]}")
