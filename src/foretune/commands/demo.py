"""`foretune demo`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from foretune.commands.score import score
from foretune.settings.commands import ScoreSettings
from foretune.settings.groups import AdapterConfig, DataConfig, ModelConfig


def demo(
    *,
    output: Annotated[Path | None, Parameter(group="Run")] = None,
    samples: Annotated[int, Parameter(group="Run")] = 32,
    json: Annotated[bool, Parameter(group="Run")] = False,
) -> None:
    """Score an adapter on real weights and real text that come with the extra `demo`: MiniLM and BBC news.

    Args:
        output: New folder for the run; the texts are written beside it, to OUTPUT-data.
        samples: Training samples of the kernel.
        json: Print result.json to stdout instead of the table.
    """
    import shlex

    from foretune.report.terminal import console
    from foretune.tasks.demo import data_of_demo, model_folder

    with data_of_demo(output) as folder:
        tokens = ["score", "--model", str(model_folder()), "--dataset", str(folder)]
        tokens += ["--target-modules", "query", "value", "--layers", "0", "2", "5"]
        tokens += ["--samples", str(samples), "--max-length", "128"]
        tokens += [] if output is None else ["--output", str(output)]
        tokens += ["--json"] if json else []
        console(stderr=True).print(f"$ {shlex.join(['foretune', *tokens])}", soft_wrap=True)
        score(
            model=ModelConfig(str(model_folder())),
            data=DataConfig(str(folder)),
            adapter=AdapterConfig(target_modules=("query", "value"), layers=(0, 2, 5)),
            settings=ScoreSettings(samples=samples, max_length=128),
            output=output,
            json=json,
        )
