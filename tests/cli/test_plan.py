"""`nanofed federate --plan`: a table and a recommendation, and nothing else happens."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from nanofed import cli
from tests.cli.conftest import Corpus
from tests.support import REPOSITORY

SITE = {"tokens_per_second": 20_000, "down_mbit": 100, "up_mbit": 20, "delay_ms": 30}


def test_a_plan_says_what_to_set_and_starts_nothing(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sites.yaml").write_text(yaml.safe_dump({"sites": {"lab-a": SITE, "lab-b": SITE}}))
    capsys.readouterr()
    command = corpus.start("federate", "--plan=sites.yaml", "--model.recipe.batch_tokens=2048")
    assert cli.main([*command, "--federation.evaluation=sites"]) == 0
    shown = capsys.readouterr().out
    assert "steps of 2,048 tokens, 2 sites" in shown
    for words in (
        "int8  int4",
        "\nlab-a ",
        "\nlab-b ",
        "--federation.down_codec=",
        "Evaluations by the sites are not counted",
    ):
        assert words in shown
    # A server says the same before it begins, which this one is not able to.
    command = ["server", *corpus.start("federate", "--plan=sites.yaml")[1:], "--listen=127.0.0.1:1", "--keys=none"]
    assert cli.main(command) == 2
    assert "--federation.down_codec=" in capsys.readouterr().out
    # Without a config it is d20 that a server serves.
    given = [f"--data.path={corpus.data}", f"--data.tokenizer={corpus.tokenizer}", "--keys=none"]
    assert cli.main(["server", "--plan=sites.yaml", *given, "--listen=127.0.0.1:1"]) == 2
    assert capsys.readouterr().out.startswith("d20, ")
    assert [path.name for path in tmp_path.iterdir()] == ["sites.yaml"]


def test_a_wrong_file_is_one_line(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sites.yaml").write_text(yaml.safe_dump({"sites": {"lab-a": {**SITE, "up_mbit": -3}}}))
    for file, said in (
        ("sites.yaml", "sites.yaml: sites.lab-a.up_mbit is -3: input should be greater than 0"),
        ("none.yaml", "there is no config file none.yaml"),
    ):
        capsys.readouterr()
        assert cli.main(corpus.start("federate", "--plan", file)) == 2
        assert capsys.readouterr().err == f"nanofed federate: {said}\n"


def test_help_tells_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["federate", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--plan FILE (such as configs/sites.yaml)" in shown and (REPOSITORY / "configs" / "sites.yaml").is_file()
