"""What is known of models, and when the catalogue is read, with a reader that a test owns."""

import threading

import pytest
from conftest import wait_until

import models
from catalogue import CatalogueError
from records import NewTask
from registry import ModelRegistry

URL = "http://127.0.0.1:9/chutes/"


def chute(name, *aliases, **values):
    fields = {"seed": models.FieldRule(type="integer", minimum=3, maximum=5)}
    more = {"aliases": list(aliases), "source": "catalogue", "fields": fields, **values}
    return models.Model(**{"name": name, "url": f"https://{name}.example/generate", **more})


class Reader:
    """Read what a test says, once the gate is open."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.gate = threading.Event()
        self.gate.set()
        self.reads = 0

    def read(self, catalogue_url, chute_url):
        self.reads += 1
        self.gate.wait(30)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self):
        self.gate.set()


@pytest.fixture
def make(configure, database, clock):
    made = []

    def make(*answers, **values):
        reader = Reader(*answers)
        config = configure(**{"CATALOGUE_URL": URL, **values})
        made.append(ModelRegistry(config, database, reader, clock))
        return made[-1], reader

    yield make
    for registry in made:
        registry.close()


def refresh(registry):
    """Refresh where that is due, and wait for its end."""
    registry.refresh_if_due()
    wait_until(lambda: not registry.is_refreshing)


def test_a_name_is_looked_up_in_the_file_then_in_the_catalogue_then_in_nothing(make):
    registry, _ = make([chute("new-one", "c-7"), chute("chutes-z", "z-image-turbo")])
    assert registry.find("new-one").source == "setting"
    refresh(registry)
    assert registry.find("new-one").url == "https://new-one.example/generate"
    assert registry.find("c-7") == registry.find("new-one")
    assert registry.find("z-image-turbo").source == "file"
    assert registry.find("New-One").source == "setting"
    assert registry.find("nothing").fields is None


def test_names_are_exact_in_case(make):
    registry, _ = make([chute("new-one", "c-7")])
    refresh(registry)
    for name in ("New-one", "C-7", "Z-image-turbo"):
        assert registry.find(name).source == "setting"
        assert registry.find(name.lower()).source != "setting"


def test_a_renamed_host_is_found_at_the_next_look_up(make, clock):
    moved = chute("new-one", url="https://elsewhere.example/generate")
    registry, _ = make([chute("new-one")], [moved])
    refresh(registry)
    clock.now += 86401
    refresh(registry)
    assert registry.find("new-one").url == moved.url


def test_the_catalogue_is_read_at_first_and_when_it_is_a_day_old(make, clock):
    registry, reader = make([chute("new-one")])
    for _ in range(3):
        refresh(registry)
    assert reader.reads == 1
    clock.now += 86401
    refresh(registry)
    assert reader.reads == 2


def test_a_catalogue_that_cannot_be_read_leaves_the_one_of_before(make, database, clock, caplog):
    registry, _ = make([chute("new-one")], CatalogueError("The catalogue is down"))
    refresh(registry)
    first = database.catalogue_state()
    clock.now += 86401
    refresh(registry)
    state = database.catalogue_state()
    assert (state.read_at, state.error) == (first.read_at, "The catalogue is down")
    assert registry.find("new-one").source == "catalogue"
    assert caplog.text.count("The catalogue is down") == 1


def test_who_asks_for_no_catalogue_gets_none(make, database):
    registry, reader = make([chute("new-one")], CATALOGUE_URL="off")
    registry.await_unknown(registry.find("new-one"))
    refresh(registry)
    assert reader.reads == 0
    assert database.hold("new-one") is None


def test_a_task_of_a_name_that_is_not_known_waits_for_one_refresh(make, database, clock):
    registry, reader = make([chute("one")], [chute("one"), chute("two")])
    refresh(registry)
    clock.now += 61
    reader.gate.clear()
    registry.await_unknown(registry.find("two"))
    database.add([NewTask("t", "p", "two", {}), NewTask("u", "p", "one", {})], clock())
    assert database.claim(clock()).id == "u"
    registry.refresh_if_due()
    assert database.claim(clock()) is None
    reader.gate.set()
    assert wait_until(lambda: database.claim(clock())).id == "t"
    assert registry.find("two").source == "catalogue"


def test_a_task_waits_no_longer_than_five_seconds(make, database, clock):
    registry, reader = make([chute("one")])
    reader.gate.clear()
    registry.await_unknown(registry.find("two"))
    database.add([NewTask("t", "p", "two", {})], clock())
    registry.refresh_if_due()
    assert database.claim(clock()) is None
    clock.now += 5
    assert database.claim(clock()).id == "t"


def test_a_name_that_is_not_known_is_asked_for_at_most_once_a_minute(make, database, clock):
    registry, reader = make([chute("one")])
    refresh(registry)
    clock.now += 59
    registry.await_unknown(registry.find("two"))
    refresh(registry)
    database.add([NewTask("t", "p", "two", {})], clock())
    assert database.claim(clock()).id == "t"
    assert reader.reads == 1


def test_the_models_of_models_alone_are_known_where_it_is_set(make):
    registry, _ = make([chute("new-one", "c-7")], MODELS="qwen-image,c-7,other")
    refresh(registry)
    known = {model.name: model.source for model in registry.known()}
    assert known == {"qwen-image": "file", "new-one": "catalogue", "other": "setting"}


def test_the_nearest_names_are_named(make):
    registry, _ = make([chute("Vonkaiser-New", "c-7")])
    refresh(registry)
    assert registry.nearest("vonkaiser-nwe") == ["Vonkaiser-New"]
    assert registry.nearest("zimage-turbo")[0] == "z-image-turbo"
    assert registry.nearest("~~~~") == []


def test_a_seed_is_chosen_within_the_models_own_range(make):
    registry, _ = make([chute("new-one")])
    refresh(registry)
    assert {registry.choose_seed("new-one") for _ in range(200)} == {3, 4, 5}
    assert registry.choose_seed("hidream") in range(2**32)
    assert registry.choose_seed("nothing") is None


def test_a_close_does_not_wait_for_a_slow_catalogue(make):
    registry, reader = make([chute("new-one")])
    reader.gate.clear()
    registry.refresh_if_due()
    registry.close()
    assert not registry.is_refreshing
