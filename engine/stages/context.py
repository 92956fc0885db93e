"""What a stage is given: its place in the run, the checkpoints and data before it, and where its own go."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from athanor import watchdog
from athanor.checkpoint import StateWriter, export_model
from athanor.config import RecipeConfig, StageConfig
from athanor.console import Console
from athanor.errors import UserError
from athanor.metrics import MetricsWriter
from athanor.model.moe import use_fp8_
from athanor.model.transformer import Decoder
from athanor.parallel import Ranks
from athanor.sharding import for_sampling, will_split
from athanor.tokenizer import Tokenizer
from athanor.weights import load_model


@dataclass
class StageContext:
    """One stage of one run."""

    name: str
    config: StageConfig
    recipe: RecipeConfig
    run_dir: Path
    ranks: Ranks
    tokenizer: Tokenizer
    tasks: dict
    metrics: MetricsWriter
    console: Console
    on_save: object = None
    """Called with no arguments after each resumable state."""
    states: StateWriter | None = None
    """Writes them; None = one after the other, while the stage waits."""

    @property
    def checkpoint_dir(self) -> Path:
        return checkpoint_dir(self.run_dir, self.name)

    @property
    def best_dir(self) -> Path:
        """The best model by the stage's validation, and best.json, which says of which step it is."""
        return self.checkpoint_dir.with_name(f"{self.name}.best")

    @property
    def state_dir(self) -> Path:
        """Resumable training states; removed when the stage is done."""
        return self.run_dir / "checkpoints" / f"{self.name}.partial"

    def discard_state(self) -> None:
        shutil.rmtree(self.state_dir, ignore_errors=True)

    @property
    def data_path(self) -> Path:
        return data_path(self.run_dir, self.name)

    def source_dir(self, reference: str) -> Path:
        """Folder of the checkpoint that `reference` names: a stage of this recipe, or a path."""
        if reference in self.recipe.stages:
            return checkpoint_dir(self.run_dir, reference)
        folder = Path(self.recipe.folder(reference))
        if not folder.is_dir():
            raise UserError(f"stage {self.name}: checkpoint {reference!r} is neither a stage of this recipe nor a folder")
        return folder

    def load(self, reference: str, *, parallel: bool = False) -> Decoder:
        """The policy of a checkpoint for sampling, with the run's products of experts.  parallel: for `parallelize_` instead, on the CPU where it is
        to be split."""
        splits = will_split(self.recipe.parallel, self.ranks) if parallel else self.recipe.parallel.rollout == "split"
        device = "cpu" if splits else str(self.ranks.device)
        model = use_fp8_(load_model(self.source_dir(reference), dtype=self.dtype, device=device), self.recipe.fp8)
        return model if parallel else for_sampling(model, self.recipe.parallel, self.ranks)

    @property
    def dtype(self):
        import torch

        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.recipe.dtype]

    def export(self, model: Decoder, folder: Path | None = None) -> Path:
        """Write the stage's result, or what belongs in another folder, in HuggingFace format (rank 0; the others hand over their parts and wait)."""
        folder = folder or self.checkpoint_dir
        with watchdog.phase("checkpoint", "finished model"):
            export_model(model, self.tokenizer, folder, writes=self.ranks.is_main)
            self.ranks.barrier()
        return folder


def checkpoint_dir(run_dir: Path, stage: str) -> Path:
    return run_dir / "checkpoints" / stage


def data_source(run_dir: Path, stages, reference: str) -> Path:
    """The JSONL file that `reference` names: what a stage wrote, or a path."""
    return data_path(run_dir, reference) if reference in stages else Path(reference)


def data_path(run_dir: Path, stage: str) -> Path:
    return run_dir / "data" / f"{stage}.jsonl"
