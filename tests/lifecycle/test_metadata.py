"""What the metadata plug-ins find: no payload is kept out for it."""

from importlib.metadata import EntryPoint

import pytest

from dlm_core import metadata
from dlm_core.lifecycle.register import Source, register_tree
from tests.lifecycle.test_register import admit, items, write
from tests.site import make_site


@pytest.fixture
def site(engine, tmp_path):
    site = make_site(engine, tmp_path)
    site.add_storage("in", "A")
    return site


def test_metadata_come_from_the_plug_ins(site):
    """FITS headers by astropy, ska-data-product.yaml by YAML; broken ones do not keep bytes out."""
    from astropy.io import fits

    write(site, {"p/ska-data-product.yaml": b"execution_block: eb-1\n", "bad.fits": b"nonsense"})
    header = fits.Header([("OBJECT", "M31"), ("EXPTIME", 2.5)])
    fits.PrimaryHDU(header=header).writeto(site.folder / "in" / "m31.fits")
    register_tree(site.context, Source("in", "test"))
    assert admit(site).done["admit"] == 3
    found = items(site)
    assert found["test:m31.fits"]["metadata"]["fits"]["primary"]["OBJECT"] == "M31"
    product = found["test:p/ska-data-product.yaml"]["metadata"]["ska_data_product"]
    assert product == {"execution_block": "eb-1"}
    assert "error" in found["test:bad.fits"]["metadata"]["fits"]


def test_a_broken_metadata_plug_in_keeps_no_bytes_out(site, tmp_path, monkeypatch):
    """Whatever it raises, when it is loaded or when it reads: it is told with the item."""
    (tmp_path / "dlm_test_licence.py").write_text("raise RuntimeError('no licence')\n")
    (tmp_path / "dlm_test_reads.py").write_text("def extract(*_):\n    raise KeyError('OBJECT')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    names = ("licence", "reads")
    points = [EntryPoint(name, f"dlm_test_{name}:extract", "") for name in names]
    monkeypatch.setattr(metadata, "entry_points", lambda group: points)
    metadata.extractors.cache_clear()
    write(site, {"x": b"1"})
    register_tree(site.context, Source("in", "test"))
    try:
        assert admit(site).done["admit"] == 1
    finally:
        metadata.extractors.cache_clear()
    found = items(site)["test:x"]["metadata"]
    assert "no licence" in found["licence"]["error"] and "OBJECT" in found["reads"]["error"]


_RESULTS = {
    "nan": "{'x': float('nan')}",
    "nul": "{'x': chr(0)}",
    "half": "{'x': chr(0xd800)}",
    "object": "{'x': object()}",
    "list": "[1, 2]",
    "told": "1 / 0 if False else (_ for _ in ()).throw(ValueError(chr(0) + chr(0xd800)))",
}


@pytest.mark.parametrize("name", _RESULTS)
def test_what_a_metadata_plug_in_finds_and_jsonb_cannot_hold_is_told(
    site, tmp_path, monkeypatch, name
):
    """The other payloads that are let in with it are, too."""
    text = (
        f"def extract(storage, path, seen):\n    return {_RESULTS[name]} if path == 'x' else None\n"
    )
    (tmp_path / f"dlm_test_{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    point = EntryPoint(name, f"dlm_test_{name}:extract", "")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [point])
    metadata.extractors.cache_clear()
    write(site, {"x": b"1", "y": b"2"})
    register_tree(site.context, Source("in", "test"))
    try:
        assert admit(site).done["admit"] == 2
    finally:
        metadata.extractors.cache_clear()
    assert "error" in items(site)["test:x"]["metadata"][name]


def test_whatever_a_data_product_file_says_it_is_let_in(site):
    """Numbers that JSON has not come as text; what repeats itself without end is told."""
    bomb = "\n".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 12))
    texts = {
        "odd": 'nan: .nan\ninf: -.inf\nnul: "a\\0b"\nhalf: "\\ud800"\nday: 2026-11-01\n',
        "bomb": f"l0: &l0 [x]\n{bomb}\n",
        "itself": "a: &a [*a]\n",
        "deep": "a: " + "[" * 3000 + "]" * 3000 + "\n",
    }
    write(site, {f"{name}/ska-data-product.yaml": text.encode() for name, text in texts.items()})
    register_tree(site.context, Source("in", "test"))
    assert admit(site).done["admit"] == len(texts)
    found = {uri[5:]: row["metadata"]["ska_data_product"] for uri, row in items(site).items()}
    told = found.pop("odd/ska-data-product.yaml")
    assert (told["nan"], told["inf"], told["nul"]) == ("NaN", "-Infinity", "ab")
    assert told["day"] == "2026-11-01"
    assert all(set(one) == {"error"} for one in found.values())
