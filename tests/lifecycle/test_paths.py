"""Where copies lie: the site's rules, tried before they are used; nothing ever meets."""

from __future__ import annotations

import pytest

from dlm_core.errors import InvalidValueError, PathMeetingError
from dlm_core.lifecycle.admit import execute_admit
from dlm_core.lifecycle.paths import place_of, plain_rules
from dlm_core.lifecycle.register import Source, register_tree
from dlm_core.lifecycle.replicate import plan_replication
from dlm_core.lifecycle.rules import find_place, set_rules
from dlm_core.lifecycle.verify import request_verification
from dlm_core.lifecycle.work import drain
from dlm_core.types import OperationKind, make_uri, uri_bucket
from tests.site import make_site


def place(uri, *rules, version=1, interface="posix"):
    """The path that rules (match, template), or lists of these, give."""
    listed = [
        {"steps": [{"match": m, "template": t} for m, t in rule]}
        if isinstance(rule, list)
        else {"match": rule[0], "template": rule[1]}
        for rule in rules
    ]
    return place_of(uri, version, interface, plain_rules(listed)).path


def test_named_groups_numbers_and_built_in_fields_fill_a_template():
    """And {hash:N} is the head of sha-1(uri), by which the catalogue spreads items too."""
    uri = "ska:eb-1/scan-3.ms"
    assert place(uri, ("ska:(?P<block>[^/]+)/(.+)", "data/{block}/{2}")) == "data/eb-1/scan-3.ms"
    assert place(uri, (".*", "{hash:2}/{hash:4}/{path}")) == (
        f"{uri_bucket(uri)[:2]}/{uri_bucket(uri)[:4]}/eb-1/scan-3.ms"
    )
    assert place(uri, (".*", "{scheme}-{version}/{name}")) == "ska-1/scan-3.ms"
    assert place(uri, ("ska:(?P<block>.+)/.*", "{block:2}/{name}")) == "eb/scan-3.ms"


def test_the_first_rule_that_matches_wins_and_none_leaves_the_usual_place():
    """A pattern has to match the whole of the name."""
    rules = [("ska:eb-1", "never"), ("ska:eb-1/(.*)", "first/{1}"), ("ska:(.*)", "second/{1}")]
    assert place("ska:eb-1/x", *rules) == "first/x"
    assert place("ska:eb-2/x", *rules) == "second/eb-2/x"
    assert place("lofar:eb-1/x", *rules) == "lofar/eb-1/x"


def test_a_chain_hands_its_text_on():
    """As Dynamo's mappings: each step maps what the step before gave; all have to match."""
    chain = [("ska:(.*)", "/store/{1}"), ("/store/(?P<d>[^/]+)/(.*)", "vol1/{d}/{2}")]
    assert place("ska:eb-1/x", chain) == "vol1/eb-1/x"
    assert place("ska:x", chain, ("(.*):(.*)", "else/{2}")) == "else/x"


def test_names_are_matched_as_people_read_them_and_kept_as_the_catalogue_does():
    """Blanks, umlauts and octets that are no UTF-8 go through."""
    uri = make_uri("test", b"run 1/\xff\xc3\xa4.fits")
    assert place(uri, ("test:run 1/(.*)", "r 1/{1}")) == "r%201/%FF%C3%A4.fits"
    assert place(uri, ("test:run 1/(.*)", "r 1/{1}"), interface="s3").startswith("r%25201!/")


def test_later_versions_never_lie_where_the_first_does():
    """In a top folder that tells them, unless the template does."""
    rule = ("ska:(.*)", "a/{1}")
    assert [place("ska:x", rule, version=n) for n in (1, 2, 10)] == ["a/x", "a@2/x", "a@10/x"]
    assert place("ska:x", ("ska:(.*)", "a/v{version}/{1}"), version=2) == "a/v2/x"


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ({"match": "(", "template": "x"}, "regular expression"),
        ({"match": "(a{99999999999})", "template": "x"}, "regular expression"),
        ({"match": "(" * 9999 + ")" * 9999, "template": "x"}, "regular expression"),
        ({"match": ".*", "template": "{nobody}"}, "{nobody}"),
        ({"match": ".*", "template": "{path.upper}"}, "path.upper"),
        ({"match": ".*", "template": "{path!r}"}, "path"),
        ({"match": ".*", "template": "{1}"}, "{1}"),
        ({"match": ".*", "template": "{hash}"}, "hash:N"),
        ({"match": ".*", "template": "{hash:99}"}, "hash:N"),
        ({"match": ".*", "template": "{"}, "template"),
        ({"match": ".*", "template": ""}, "match and template"),
        ({"match": ".*"}, "match and template"),
        ({"match": "(?P<hash>.*)", "template": "{hash:2}"}, "other names"),
        ({"steps": []}, "steps"),
        ("text", "match and template"),
    ],
)
def test_a_rule_that_is_none_is_refused(rule, told):
    """In one line, with its number."""
    with pytest.raises(InvalidValueError) as caught:
        plain_rules([{"match": ".*", "template": "{path}"}, rule])
    assert "path rule 2" in str(caught.value) and told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "interface"),
    [
        ("../{path}", "posix"), ("/{path}", "posix"), ("a//{path}", "posix"), ("a/./{path}", "s3"),
        (".dlm/trash/{path}", "posix"), (".dlm", "posix"), ("{path}/", "s3"),
        ("{path}" * 100, "posix"), ("{path}/" * 300 + "x", "s3"),
    ],
)  # fmt: skip
def test_no_rule_leads_out_of_the_root_or_to_what_is_the_dlms_own(template, interface):
    """Nor to names that the storage cannot have."""
    with pytest.raises(InvalidValueError, match="path rule 1 makes of test:file"):
        place("test:file", ("test:(.*)", template), interface=interface)


def test_names_that_s3_does_not_keep_lie_encoded_in_a_folder_of_their_own():
    """As they do without rules."""
    uri = make_uri("test", "a\\b\n")
    assert place(uri, ("test:(.*)", "data/{1}"), interface="s3") == "data!/a%255Cb%250A"


# --- on a catalogue -------------------------------------------------------------------------------

SPREAD = [{"match": r"test:(.*)", "template": "{hash:2}/{1}"}]


@pytest.fixture
def site(engine, tmp_path):
    site = make_site(engine, tmp_path)
    site.add_storage("a", "A")
    site.add_storage("b", "B")
    return site


def test_copies_lie_where_the_rules_say_and_what_is_there_stays(site):
    """Made again in its old place, too: the rules are for copies that are new."""
    old = site.add_item("run/1", b"one", on="a")
    site.settle()
    assert site.visible("b") == {"test/run/1": b"one"}
    trial = set_rules(site.context, "b", SPREAD)
    assert (trial.items, trial.kept) == (1, 1)
    new = site.add_item("run/2", b"two", on="a")
    site.settle()
    head = uri_bucket("test:run/2")[:2]
    assert site.visible("b") == {"test/run/1": b"one", f"{head}/run/2": b"two"}
    (site.folder / "b" / "test/run/1").write_bytes(b"bad")
    site.execute("UPDATE replica SET state = 'SUSPECT' WHERE oid = :oid AND state = 'READY'"
                 " AND storage_id = :s", oid=old, s=site.storages["b"])  # fmt: skip
    site.execute("UPDATE replica SET state = 'MISSING' WHERE oid = :oid AND state = 'SUSPECT'",
                 oid=old)  # fmt: skip
    (site.folder / "b" / "test/run/1").unlink()
    site.settle()
    assert site.visible("b")["test/run/1"] == b"one"
    assert site.item(new)["shortfall"] is None


def test_a_dry_run_shows_examples_and_changes_nothing(site):
    """A few for each rule, and how many each takes."""
    for number in range(5):
        site.add_item(f"run/{number}", b"x", on="a")
    rules = [{"match": "test:run/[0-3]", "template": "few/{name}"}, *SPREAD]
    trial = set_rules(site.context, "b", rules, dry_run=True)
    assert trial.by_rule == {1: 4, 2: 1} and len(trial.examples) == 4
    assert trial.examples[0]["path"].startswith("few/")
    assert site.query("SELECT path_rules AS p FROM storage WHERE name = 'b'") == [{"p": None}]


@pytest.mark.parametrize(
    ("first", "second", "template"),
    [("a/x", "b/x", "all/{name}"), ("d", "d/e", "p/{path}"), ("d/e", "d", "p/{path}")],
)
def test_rules_by_which_copies_would_meet_are_refused(site, first, second, template):
    """At one path, or a file where the other needs a folder; they name both, nothing is changed."""
    site.add_item(first, b"1", on="a")
    site.add_item(second, b"2", on="b")
    site.add_storage("c", "C")
    with pytest.raises(PathMeetingError) as caught:
        set_rules(site.context, "c", [{"match": "test:.*", "template": template}])
    assert f"test:{first} " in str(caught.value) and f"test:{second} " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert site.query("SELECT path_rules AS p FROM storage WHERE name = 'c'") == [{"p": None}]


def test_a_place_that_is_taken_is_told_and_another_storage_is_chosen(site):
    """Items that come after the rules may meet in spite of the trial: nothing is overwritten, the
    item says why, and a storage that has a place takes the copy."""
    set_rules(site.context, "b", [{"match": "test:.*", "template": "all/{name}"}])
    first = site.add_item("1/x", b"one", on="a")
    site.settle()
    second = site.add_item("2/x", b"two", on="a")
    site.settle()
    assert site.visible("b") == {"all/x": b"one"}
    assert "its place all/x is that of test:1/x" in site.item(second)["shortfall"]
    assert "impossible now" in site.item(second)["shortfall"]
    site.add_storage("c", "C")
    site.advance(hours=7)
    site.settle()
    assert site.replicas(second) == {"a": "READY", "c": "READY"}
    assert site.visible("c")["test/2/x"] == b"two" and site.item(second)["shortfall"] is None
    assert site.replicas(first)["b"] == "READY"


def test_two_that_meet_in_one_batch_do_not_both_lie_there(site):
    """One gets the place, the other says why not."""
    set_rules(site.context, "b", [{"match": "test:.*", "template": "all/{name}"}])
    oids = [site.add_item(f"{n}/x", b"%d" % n, on="a") for n in range(2)]
    site.settle()
    site.advance(minutes=1)
    site.settle()
    assert len(site.visible("b")) == 1
    told = [site.item(oid)["shortfall"] for oid in oids]
    assert sorted(text is None for text in told) == [False, True]
    assert any("its place all/x" in (text or "") for text in told)


def test_an_item_that_the_rules_have_no_place_for_does_not_stop_the_others(site):
    """It says which rule and why; it goes elsewhere if there is an elsewhere."""
    set_rules(site.context, "b", [{"match": "test:(?P<head>[a-z]*)(.*)", "template": "{head}{2}"}])
    good = site.add_item("run/1", b"1", on="a")
    set_rules(site.context, "b", [{"match": "test:(?P<d>[a-z]*)/?(.*)", "template": "{d}/{2}"}])
    bad = site.add_item("1", b"2", on="a")
    site.settle()
    assert site.replicas(good)["b"] == "READY"
    assert "path rule 1 makes of test:1" in site.item(bad)["shortfall"]


def test_where_an_item_would_lie_is_told(site):
    """The place that its copy has, or by the rules; it need not be in the catalogue."""
    site.add_item("run/1", b"1", on="a")
    set_rules(site.context, "b", SPREAD)

    def where(name, uri, version=None):
        return site.context.transact(lambda c: find_place(c, name, uri, version))

    assert where("a", "test:run/1")["path"] == "run/1"
    found = where("b", "test:run/1")
    assert found["path"] == uri_bucket("test:run/1")[:2] + "/run/1" and found["rule"] == 1
    assert where("b", "test:none", 3)["version"] == 3
    with pytest.raises(InvalidValueError):
        where("b", "test:/absolute")


def test_thousands_of_items_are_tried_in_seconds(site):
    """The rules' cost follows the number of items; the pages are put together whole."""
    site.execute(
        """INSERT INTO data_item (oid, uri, uri_bucket)
           SELECT gen_random_uuid(), 'test:run/' || n, '00000' FROM generate_series(1, 20000) n"""
    )
    trial = set_rules(site.context, "b", SPREAD)
    assert (trial.items, trial.by_rule) == (20_000, {1: 20_000})
    site.execute(
        """INSERT INTO data_item (oid, uri, uri_bucket)
           VALUES (gen_random_uuid(), 'test:run/1/2', '00000')"""
    )
    with pytest.raises(PathMeetingError, match="test:run/1/2"):
        set_rules(site.context, "b", [{"match": "test:(.*)", "template": "x/{1}"}])


@pytest.mark.parametrize("name", ["t", "u"])
@pytest.mark.parametrize("order", ["file tree", "tree file", "file+tree"])
def test_no_copy_lies_in_that_of_another_item(site, order, name):
    """A uri may go on where that of a directory ends. Of the two only one gets a copy on a storage:
    a file put into a directory damages it, and what both have would go with the first to go."""
    site.add_storage("in", "I", mode="read_only")
    site.add_storage("other", "O", mode="read_only")
    for storage, file in (("in", "t"), ("other", name)):
        (site.folder / storage / "s.ms").mkdir()
        (site.folder / storage / "s.ms" / file).write_bytes(file.encode())
    sources = {
        "file": Source("other", "ska"),
        "tree": Source("in", "ska", as_directory=("*.ms",)),
    }
    site.execute("UPDATE storage SET mode = 'offline' WHERE name NOT IN ('in', 'other', 'b')")
    for step in order.split():
        for source in step.split("+"):
            register_tree(site.context, sources[source])
        drain(site.context, {OperationKind.ADMIT: execute_admit})
        plan_replication(site.context)
        site.work(OperationKind.COPY)
    copies = site.query(
        "SELECT FROM replica WHERE state = 'READY' AND storage_id = :s", s=site.storages["b"]
    )
    assert len(copies) == 1 and len(site.visible("b")) == 1
    site.context.transact(lambda c: request_verification(c, actor="user:test", now=site.now))
    site.work(OperationKind.VERIFY)
    assert len(site.visible("b")) == 1 and site.private("b", "quarantine") == []
