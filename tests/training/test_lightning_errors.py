"""What Lightning raises over options names them; what nanofed, torch or the machine raise in the same place passes."""

from __future__ import annotations

import pytest
import torch
from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException

from nanofed.errors import ConfigError, DataError
from nanofed.training.lightning_errors import lightning_errors


def raised_in_the_block(error: Exception) -> None:
    raise error


def test_what_lightning_refuses_names_the_options_that_were_given() -> None:
    with (
        pytest.raises(ConfigError, match=r"^trainer: .*toaster.* \(set: trainer\.accelerator\)$"),
        lightning_errors("trainer", ["trainer.accelerator"]),
    ):
        Trainer(accelerator="toaster")


@pytest.mark.parametrize(
    "error",
    [MisconfigurationException("limit_val_batches\nmust be"), ModuleNotFoundError("No module named 'wandb'")],
    ids=lambda error: type(error).__name__,
)
def test_an_option_or_package_that_is_missing_is_about_options_wherever_it_shows(error: Exception) -> None:
    with pytest.raises(ConfigError, match=r"^trainer: "), lightning_errors("trainer"):
        raised_in_the_block(error)


@pytest.mark.parametrize(
    "error",
    [DataError("no shards"), KeyError("step"), OSError(28, "No space left on device"), RuntimeError("CUDA error")],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_of_a_run_pass_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as passed, lightning_errors("trainer", ["trainer.devices"]):
        raised_in_the_block(error)
    assert passed.value is error


def test_an_error_of_torch_in_a_step_is_none_of_options() -> None:
    with pytest.raises(RuntimeError, match="must match"), lightning_errors("trainer"):
        torch.ones(2) + torch.ones(3)


def test_whatever_the_building_of_a_trainer_raises_is_about_its_options() -> None:
    with pytest.raises(ConfigError, match="fabric: unknown key 'x'"), lightning_errors("fabric", building=True):
        raised_in_the_block(KeyError("x"))
