"""The studio's history: what is kept, found, starred, deleted and brought back."""

import sqlite3
import threading

import pytest

from armchair.errors import RequestError
from armchair.serve import history as module
from armchair.serve.history import History


def add(history: History, prompt: str, count: int = 1, **told):
    record = {"prompt": prompt, "score": 0.5}
    return history.add("draw", prompt, count, [(record, b"png %d" % i) for i in range(count)], **told)


def prompts(entries) -> list[str]:
    return [entry.prompt for entry in entries]


@pytest.fixture
def history(tmp_path) -> History:
    return History(tmp_path / "deep" / "history.sqlite")


def test_everything_is_there_after_a_restart(history):
    entry = add(history, "a red apple", 3)
    history.set_favourite(entry.pictures[1].id, True)
    (found,) = History(history.path).entries()
    assert found.id == entry.id and found.prompt == "a red apple" and found.candidates == 3
    assert [history.png(picture.id) for picture in found.pictures] == [b"png 0", b"png 1", b"png 2"]
    assert found.pictures[0].record == {"prompt": "a red apple", "score": 0.5} and found.pictures[0].score == 0.5
    assert [picture.favourite for picture in found.pictures] == [False, True, False]


def test_search_wants_all_words_in_any_order_and_takes_signs_for_themselves(history):
    for prompt in ("a red apple", "a green apple", "100% red", "snake_case"):
        add(history, prompt)
    history.add("grid", "{red|blue} dog", 1, [({"prompt": f"{colour} dog"}, b"") for colour in ("red", "blue")])
    assert prompts(history.entries("APPLE red")) == ["a red apple"]
    assert prompts(history.entries("100%")) == ["100% red"]
    assert prompts(history.entries("_")) == ["snake_case"]
    assert prompts(history.entries("blue dog")) == ["{red|blue} dog"]
    assert prompts(history.entries("'; DROP TABLE entries; --")) == []


def test_favourites_show_the_starred_pictures_alone(history):
    add(history, "first", 2)
    second = add(history, "second", 2)
    history.set_favourite(second.pictures[1].id, True)
    (found,) = history.entries(favourites=True)
    assert [picture.id for picture in found.pictures] == [second.pictures[1].id]


def test_deleted_is_gone_at_once_and_comes_back_until_a_restart(history):
    entry = add(history, "oops")
    first = entry.pictures[0].id
    history.delete(entry.id)
    assert history.entries() == []
    for ask in (history.entry, lambda _: history.picture(first), lambda _: history.png(first)):
        with pytest.raises(RequestError, match="deleted"):
            ask(entry.id)
    history.restore(entry.id)
    assert prompts(history.entries()) == ["oops"]
    history.delete(entry.id)
    again = History(history.path)
    with pytest.raises(RequestError, match="no entry"):
        again.restore(entry.id)
    with sqlite3.connect(history.path) as store:
        assert store.execute("SELECT COUNT(*) FROM pictures").fetchone() == (0,)
    store.close()


def test_past_the_limit_the_oldest_without_a_favourite_go(tmp_path):
    history = History(tmp_path / "h.sqlite", limit=3)
    kept = add(history, "0")
    history.set_favourite(kept.pictures[0].id, True)
    for i in range(1, 6):
        add(history, str(i))
    assert prompts(history.entries()) == ["5", "4", "3", "0"]


def test_long_lists_come_by_pages(history, monkeypatch):
    monkeypatch.setattr(module, "PAGE", 2)
    for i in range(5):
        add(history, str(i))
    first = history.entries()
    assert prompts(first) == ["4", "3"]
    assert prompts(history.entries(before=first[-1].id)) == ["2", "1"]


def test_many_threads_and_a_second_opener_write_at_once(history):
    other = History(history.path)
    threads = [threading.Thread(target=add, args=(h, f"{i}")) for i in range(8) for h in (history, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(history.entries()) == 16


def test_other_files_are_refused_and_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("my notes, which are no database at all " * 40)
    with pytest.raises(RequestError, match="cannot be used as a history"):
        History(path)
    assert path.read_text().startswith("my notes")
    newer = History(tmp_path / "h.sqlite").path
    with sqlite3.connect(newer) as store:
        store.execute("PRAGMA user_version = 99")
    store.close()
    with pytest.raises(RequestError, match="format 99"):
        History(newer)


def test_what_is_not_there_is_said(history):
    for ask in (history.entry, history.picture, history.png, history.delete, history.restore):
        with pytest.raises(RequestError, match="there is no"):
            ask(7)
    with pytest.raises(RequestError, match="there is no picture 7"):
        history.set_favourite(7, True)
