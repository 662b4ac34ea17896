"""What docs/pools.md says of files and keys; its code is run by tests/documentation."""

import re
from pathlib import Path

from hooklens.pool import CausalLMPool
from hooklens.pool.config.settings import KEYS

PAGE = (Path(__file__).parents[2] / "docs" / "pools.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    found: list[str] = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert found
    return found


def test_its_file_loads(tmp_path: Path) -> None:
    (file,) = blocks("yaml")
    (tmp_path / "pool.yaml").write_text(file)
    pool = CausalLMPool.from_yaml(tmp_path / "pool.yaml")
    assert pool.model_names == ["math", "code"]
    assert str(pool.load_model("math").embed.W_E.dtype) == "torch.bfloat16"


def test_it_lists_every_key() -> None:
    table = PAGE.partition("## Keys")[2].partition("##")[0]
    assert set(re.findall(r"`(\w+)`", table)) >= set(KEYS)
