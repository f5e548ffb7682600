"""`unolora doctor`'s findings."""

import importlib.metadata
import importlib.util

import pytest
import torch

from unolora import doctor


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNOLORA_CACHE", str(tmp_path / "not" / "there"))
    return tmp_path / "not" / "there"


def test_what_is_found(cache):
    found = doctor.examine()
    assert list(found) == [
        *doctor.CORE, "python", "platform", "device", "processor", "threads", "bf16", "cache", "free space", "missing"
    ]  # fmt: skip
    assert all(isinstance(value, str) and value for value in found.values())
    assert found["torch"] == torch.__version__
    assert found["threads"] == str(torch.get_num_threads())
    assert found["free space"].endswith(" GiB")
    assert not cache.exists(), "looking makes no folder"


def test_an_empty_and_a_full_cache(cache):
    assert doctor.examine()["cache"] == f"{cache} (empty; `unolora train` fills it when asked to)"
    cache.mkdir(parents=True)
    (cache / "b.whl").write_text("")
    (cache / "a").mkdir()
    assert doctor.examine()["cache"] == f"{cache} (a, b.whl)"


@pytest.mark.parametrize("gone", [[], ["plotly"], ["plotly", "fastapi", "uvicorn"]])
def test_missing_extras_come_with_the_command_that_installs_them(cache, monkeypatch, gone):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in gone else object())
    found = doctor.examine()["missing"]
    if not gone:
        assert found == "nothing"
    for name in gone:
        assert f"{name} (pip install 'unolora[{doctor.OPTIONAL[name]}]')" in found


def test_a_missing_core_library_is_told(cache, monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name == "datasets":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert doctor.examine()["datasets"] == "missing: pip install unolora"


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        ({}, "emulated, slow"),
        ({"_is_avx512_bf16_supported": True}, "native (AVX512-BF16)"),
        ({"_is_avx512_bf16_supported": True, "_is_amx_tile_supported": True}, "native (AMX, AVX512-BF16)"),
    ],
)
def test_bf16_on_a_processor(monkeypatch, flags, answer):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda probe=probe: flags.get(probe, False), raising=False)
    assert doctor._bf16() == answer


def test_probes_that_a_release_lacks_are_a_no(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, probe, raising=False)
    assert doctor._bf16() == "emulated, slow"


@pytest.mark.parametrize("native", [True, False])
def test_a_gpu(monkeypatch, native):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert doctor._device() == "2 x A100"
    assert doctor._bf16() == ("native" if native else "emulated, slow")
