"""The folder of a run: where it is, and what may be wrong with the files in it."""

import jax
import jax.numpy as jnp
import pytest

from halonet_jax import config as config_lib
from halonet_jax.errors import ConfigError, StorageError
from halonet_jax.runtime import workdir


@pytest.mark.parametrize("given, path", [
    ("~", "{home}"), ("~/run", "{home}/run"), ("./~/run", "{here}/~/run"), ("run/../a b", "{here}/a b"), ("/x/$HOME", "/x/$HOME"),
    ("gs://bucket/run", "gs://bucket/run"),
])  # fmt: skip
def test_paths(given, path, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert str(workdir.locate(given)) == path.format(home=tmp_path / "home", here=tmp_path)


@pytest.mark.parametrize(
    "given, message", [("", "workdir is empty"), ("~no_such_user/run", "cannot be resolved"), ("a\0b", "cannot be resolved")]
)
def test_no_paths(given, message):
    with pytest.raises(ConfigError, match=message):
        workdir.locate(given)


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for path in ("file", "file/run"):
        with pytest.raises(ConfigError, match="cannot be written .*, or give another --workdir"):
            workdir.open_workdir(config_lib.digits(), str(tmp_path / path))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[1]", b"[" * 100_000, b'{"batch_size": ' + b"9" * 5000 + b"}", None]
)
def test_a_damaged_config_is_named_and_written_anew(tmp_path, content, caplog):
    path = tmp_path / "config.json"
    path.mkdir() if content is None else path.write_bytes(content)
    opened = workdir.open_workdir(config_lib.digits(), str(tmp_path))
    assert "The config cannot be compared with this workdir's last run: " in caplog.text
    if content is None:
        with pytest.raises(StorageError, match="config.json cannot be written .*; move away what is in its place, then"):
            workdir.record_run(config_lib.digits(), opened)
        path.rmdir()
    workdir.record_run(config_lib.digits(), opened)
    caplog.clear()
    workdir.open_workdir(config_lib.digits(), str(tmp_path))
    assert not caplog.text and not (tmp_path / ".writable").exists()


def test_the_compile_cache_follows_the_workdir_unless_the_user_chose_one(tmp_path):
    options = {"jax_persistent_cache_min_compile_time_secs": 0, "jax_persistent_cache_min_entry_size_bytes": 0}
    options |= {"jax_compilation_cache_dir": None}
    before = {key: getattr(jax.config, key) for key in options}
    try:
        for key, value in options.items():
            jax.config.update(key, value)
        for name, power in (("first", 3), ("second", 5)):
            workdir.use_compile_cache(tmp_path / name)
            jax.jit(lambda x, power=power: x**power + jnp.sin(x))(jnp.ones(7)).block_until_ready()
            assert list((tmp_path / name / "compile_cache").iterdir())
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "chosen"))
        workdir.use_compile_cache(tmp_path / "third")
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "chosen")
    finally:
        for key, value in before.items():
            jax.config.update(key, value)
        workdir.compilation_cache.reset_cache()
