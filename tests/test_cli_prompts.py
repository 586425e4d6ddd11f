"""Datasets for `fastppo train`: every format, text and chat, and what is said about a broken one."""

import json

import pytest

from fastppo.cli.errors import UserError
from fastppo.cli.prompts import find_column, load_rows, make_prompts
from fastppo.cli.tiny_lm import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat sat on the mat", "a dog ran"] * 5, vocab_size=300)


ROWS = [{"prompt": "the cat", "answer": 1}, {"prompt": "a dog", "answer": 2}]


def test_every_file_format_gives_the_same_rows(tmp_path):
    import datasets
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "splits")
    for name in ("a.jsonl", "a.json", "a.parquet", "saved", "splits"):
        assert load_rows(str(tmp_path / name)) == ROWS, name
    with pytest.raises(UserError, match="has no split 'tran'. Did you mean 'train'"):
        load_rows(str(tmp_path / "splits"), "tran")


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("none.jsonl", None, "there is no file"),
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": \n', "line 2: not JSON"),
        ("a.jsonl", '"just text"', "every row must be an object"),
        ("a.txt", "x", "must end in .jsonl, .json or .parquet; got '.txt'"),
        ("a.parquet", "not parquet", "cannot read .*a.parquet"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, text, wanted):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=wanted):
        load_rows(str(tmp_path / name))


def test_a_name_that_is_neither_file_nor_dataset_is_named(monkeypatch):
    import datasets

    def offline(*args, **kwargs):
        raise ConnectionError("no network")  # an OSError, as datasets raises it

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match="nobody/nothing is no file here.*no network"):
        load_rows("nobody/nothing")


def test_columns_are_found_or_asked_for():
    assert find_column([{"id": 1, "question": "?"}], None, "d") == "question"
    assert find_column([{"id": 1, "text": "", "body": ""}], "body", "d") == "body"
    with pytest.raises(UserError, match="d has no column 'promt'. Did you mean 'prompt'"):
        find_column([{"prompt": ""}], "promt", "d")
    with pytest.raises(UserError, match="it has a, b. Name the one .*--prompt-column"):
        find_column([{"a": 1, "b": 2}], None, "d")


def test_text_is_cut_to_its_first_tokens_and_keeps_its_columns(tokenizer):
    prompt = make_prompts([{"prompt": "the cat sat on the mat", "answer": 3}], "prompt", tokenizer, 2, None)[0]
    assert (prompt.text, prompt.columns) == ("the cat", {"answer": 3})
    assert prompt.tokens.tolist() == tokenizer("the cat").input_ids


def test_chat_messages_go_through_the_template_without_the_answer(tokenizer):
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    with pytest.raises(UserError, match="row 1: .*no chat template"):
        make_prompts([{"m": messages}], "m", tokenizer, None, None)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    try:
        assert make_prompts([{"m": messages}], "m", tokenizer, None, None)[0].text == "<user>the cat<assistant>"
        with pytest.raises(UserError, match="no message before the assistant's"):
            make_prompts([{"m": messages[1:]}], "m", tokenizer, None, None)
    finally:
        tokenizer.chat_template = None


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([{"p": "a"}, {"q": "b"}], "row 2 has no column 'p'"),
        ([{"p": "  "}], "row 1: a prompt must be text, or messages .*; got '  '"),
        ([{"p": 3}], "row 1: .* got 3"),
        ([{"p": "the cat sat on the mat"}], "row 1: 6 prompt tokens .* do not fit .*--prompt-tokens 4"),
    ],
)
def test_a_broken_row_is_named(tokenizer, rows, wanted):
    with pytest.raises(UserError, match=wanted):
        make_prompts(rows, "p", tokenizer, None, 4)
