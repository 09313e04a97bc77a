"""Limits of control groups, as both versions of Linux write them."""

from pathlib import Path

from tramontane.cli.machine import read_group_limits, read_memory


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_the_groups_of_version_1_around_a_process(tmp_path: Path) -> None:
    """T25: the limit stands in a group within groups, and the page cache can be taken back."""
    base = "sys/fs/cgroup/memory"
    write(tmp_path, {
        "proc/self/cgroup": "5:cpu:/\n4:memory:/outer/inner\n0::/\n",
        f"{base}/memory.limit_in_bytes": "9223372036854771712\n",
        f"{base}/outer/memory.limit_in_bytes": "1000000\n",
        f"{base}/outer/memory.stat": "cache 7\ntotal_cache 900000\ntotal_rss 300000\n",
        f"{base}/outer/inner/memory.limit_in_bytes": "500000\n",
        f"{base}/outer/inner/memory.stat": "rss 1\ntotal_rss 100000\n",
    })  # fmt: skip
    assert read_group_limits(tmp_path) == [(500000, 100000), (1000000, 300000)]


def test_the_groups_of_version_2(tmp_path: Path) -> None:
    """T25."""
    base = "sys/fs/cgroup"
    write(tmp_path, {
        "proc/self/cgroup": "0::/user/run.scope\n",
        f"{base}/user/memory.max": "max\n",
        f"{base}/user/run.scope/memory.max": "800000\n",
        f"{base}/user/run.scope/memory.stat": "anon 200000\nfile 600000\n",
    })  # fmt: skip
    assert read_group_limits(tmp_path) == [(800000, 200000)]


def test_a_container_that_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    write(tmp_path, {
        "proc/self/cgroup": "4:memory:/docker/abc\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "500000\n",
    })  # fmt: skip
    assert read_group_limits(tmp_path) == [(500000, 0)]


def test_a_system_without_groups(tmp_path: Path) -> None:
    assert read_group_limits(tmp_path) == []


def test_what_is_free_here() -> None:
    memory = read_memory()
    assert memory["available_bytes"] is None or 0 < memory["free_bytes"] <= memory["total_bytes"]
