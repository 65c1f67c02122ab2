"""``fastlora plan``: what it says, and what it refuses."""

import json

import pytest
from typer.testing import CliRunner, Result

from fastlora.cli import app

KEYS = {"path", "tile", "predicted_us", "ceiling_us", "overhead", "bytes", "flops", "rejected"}


def run(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, ["plan", *arguments])


def test_json() -> None:
    result = run("--gpu", "H100", "--shape", "8192x4096x4096", "--rank", "16", "--dropout", "0.1", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record.keys() >= KEYS
    assert record["path"] == "split"
    assert record["overhead"] == pytest.approx(record["predicted_us"] / record["ceiling_us"])
    assert {each["path"] for each in record["rejected"]} == {"single", "epilogue", "library"}
    assert all(each["reason"] for each in record["rejected"])


def test_words() -> None:
    result = run("--gpu", "l4", "--shape", "512x768x3072")
    assert result.exit_code == 0, result.output
    for part in ("L4", "predicted, not measured", "the ceiling is", "Not "):
        assert part in " ".join(result.stdout.split())


def test_a_quantised_weight() -> None:
    asked = ("--gpu", "H100", "--shape", "8192x4096x4096", "--dropout", "0.1", "--weight", "nf4")
    record = json.loads(run(*asked, "--json").stdout)
    assert record["weight"] == "nf4"
    assert 0.5 < record["weight_bytes"] / 4096**2 < 0.52
    for part in ("forward", "backward"):
        assert [launch["name"] for launch in record[part]].count("dequantise_4bit") == 1
    words = " ".join(run(*asked).stdout.split())
    assert "over a weight in nf4 (8.3 MiB)" in words
    assert "dequantise_4bit" in words
    dense = json.loads(run(*asked[:-1], "dense", "--json").stdout)
    assert dense["weight_bytes"] == 2 * 4096**2
    assert dense["predicted_us"] < record["predicted_us"]


def test_layers_that_share_their_input() -> None:
    """Beside the same layers one by one: each as its own plan has it, and two sums of dX."""
    group = ("--gpu", "H100", "--shape", "8192x4096x4096", "--sharing", "1024,512")
    record = json.loads(run(*group, "--json").stdout)
    assert (record["sharing"], record["weight_bytes"]) == ([1024, 512], 2 * 4096 * (4096 + 1024 + 512))
    alone = [
        json.loads(run("--gpu", "H100", "--shape", f"8192x4096x{n}", "--json").stdout)
        for n in (4096, 1024, 512)
    ]
    assert [launch["name"] for launch in record["forward"]] == ["shared_down", *["lora_forward"] * 3]
    launches = [launch["name"] for launch in record["backward"]]
    assert launches.count("shared_grad_x") == 1
    assert "dX + dX" not in launches
    apart = record["apart"]
    assert apart["forward"] == [launch for each in alone for launch in each["forward"]]
    *of_layers, first, second = apart["backward"]
    assert of_layers == [launch for each in alone for launch in each["backward"]]
    assert first["name"] == second["name"] == "dX + dX"
    assert apart["predicted_us"] > record["predicted_us"] > record["ceiling_us"]
    assert {each["path"] for each in record["rejected"]} == {"epilogue", "separate"}
    words = " ".join(run(*group).stdout.split())
    for part in ("4096 + 1024 + 512", "backward, shared", "one by one, and autograd's sums", "Not separate"):
        assert part in words


def test_an_adapter_needs_two_sizes() -> None:
    result = run("--gpu", "A100", "--shape", "4096x768", "--op", "adapter", "--rank", "64", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["outputs"] == 768


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu", "H10", "--shape", "8x8x8"), "did you mean 'H100'? expected a GPU out of A100, A10"),
        (("--gpu", "H100", "--shape", "8x8"), "rows x inputs x outputs, as in 8192x4096x4096"),
        (("--gpu", "H100", "--shape", "8x0x8"), "all at least 1, got '8x0x8'"),
        (("--gpu", "H100", "--shape", "8x16x32", "--op", "adapter"), "as many outputs as inputs"),
        (("--gpu", "H100", "--shape", "8x8x8", "--dropout", "1"), "in [0, 1), got 1.0"),
        (
            ("--gpu", "H100", "--shape", "8x8", "--op", "adapter", "--weight", "nf4"),
            "the op lora_linear beside",
        ),
        (("--gpu", "H100", "--shape", "8x8x8", "--sharing", "8,0"), "as in 1024,1024, at least 1, got '8,0'"),
        (("--gpu", "H100", "--shape", "8x8x8", "--sharing", "8x8"), "as in 1024,1024, at least 1, got '8x8'"),
        (
            ("--gpu", "H100", "--shape", "8x8x8", "--sharing", "8", "--weight", "nf4"),
            "a dense weight beside --sharing, got lora_linear and nf4",
        ),
    ],
    ids=["gpu", "sizes", "zero", "adapter", "dropout", "weight", "no outputs", "no list", "nf4"],
)
def test_bad_input(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
