"""Distillation as R1 does it: plain SFT of a small student on the teacher's rejection-sampled responses (arXiv 2501.12948, section 2.4)."""

from athanor.config import DistillConfig
from athanor.stages import sft
from athanor.stages.context import StageContext, data_source


def run(context: StageContext, config: DistillConfig) -> dict:
    """Fine-tune the student on the teacher's samples and export."""
    examples = [example for name in config.data for example in sft.read_examples(data_source(context.run_dir, context.recipe.stages, name))]
    student = context.load(config.init, parallel=True)
    return sft.fit(context, config, student, examples)
