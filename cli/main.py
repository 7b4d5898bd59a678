"""`moe-compress`: the commands and how they fail.

A user sees one line when something is wrong; exit code 2 when the input was wrong, 1 when a run failed, 130 when the
user interrupted it. A traceback only with `--debug`. Heavy imports happen inside commands, so that `--help` is instant.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from moe_compress.errors import MoeCompressError
from moe_compress.heap import reuse_freed

# Libraries that talk on import are told not to, before anything imports them.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Torch's threads wait for each other by spinning, for milliseconds: where another program takes a core, that is most of
# what they do. Less costs nothing where none does.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


class _Commands(click.Group):
    """Turns errors into one line and an exit code."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        """See click; what it says of wrong arguments becomes one line too."""
        try:
            code = super().main(*arguments, **{**options, "standalone_mode": False})
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            code = error.exit_code
        except click.ClickException as error:
            context = getattr(error, "ctx", None)
            command = context.command_path if context is not None else "moe-compress"
            message = error.format_message().strip().rstrip(".")
            if "unexpected extra argument" in message and {"--calibrate", "--text"} & set(sys.argv):
                message += ": quote a glob, or the shell makes several arguments of it"
            _say(f"{message[:1].lower()}{message[1:]} (see `{command} --help`)")
            code = error.exit_code
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        """See click."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            again = ": the same command goes on from here" if ctx.invoked_subcommand == "run" else ""
            _say(f"interrupted{again}")
            ctx.exit(130)
        except Exception as error:
            if "--debug" in sys.argv:
                raise
            _say(_explained(error))
            ctx.exit(error.exit_code if isinstance(error, MoeCompressError) else 1)


def _say(text: str) -> None:
    click.echo(f"moe-compress: {' '.join(text.split())}", err=True)


def _explained(error: Exception) -> str:
    if isinstance(error, MoeCompressError):
        return str(error)
    if isinstance(error, MemoryError):
        return "out of memory; see --help of the command for what to reduce"
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        again = "; free some space and run the same command again" if error.errno == errno.ENOSPC else ""
        return f"{where}{error.strerror}{again}"
    text = str(error).strip().splitlines()
    what = f"{type(error).__name__}: {text[0] if text else ''}".strip()
    return f"unexpected {what} (run again with --debug for the whole story)"


debug_option = click.option("--debug", is_flag=True, help="Show the traceback of an error.")


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="moe-compress")
def main() -> None:
    """Make Mixture-of-Experts language models small enough to run.

    \b
    moe-compress inspect MODEL          what a checkpoint holds, nothing loaded; with --calibrate, its routing
    moe-compress recipes                ready recipes
    moe-compress run RECIPE             compress, verify, score
    """
    reuse_freed()


def _settings(pairs: tuple[str, ...]) -> dict[str, str]:
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"{pair!r} is not KEY=VALUE", param_hint="--set")
        settings[key] = value
    return settings


@main.command()
@click.argument("recipe")
@click.option("--model", metavar="FOLDER", help="Checkpoint (short for --set model=…).")
@click.option("--output", metavar="FOLDER", help="Where the result goes (short for --set output=…).")
@click.option(
    "--calibrate",
    multiple=True,
    metavar="TEXT",
    help="Text file, folder or glob to calibrate on instead of the recipe's; repeatable. A ready recipe then takes "
    "sequences of 2048 tokens, or what the model reads.",
)
@click.option("--text", multiple=True, metavar="TEXT", help="The same for text to score before and after.")
@click.option("--tasks", help="lm-eval tasks to score before and after, separated by commas, instead of the recipe's.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change any key, e.g. passes.0.keep=0.5; repeatable."
)
@click.option("--dry-run", is_flag=True, help="Check everything, print the sizes that would result, change nothing.")
@click.option(
    "--overwrite", is_flag=True, help="Replace what the output folder holds, once the new result is complete."
)
@click.option(
    "--fresh",
    is_flag=True,
    help="Forget finished layers instead of continuing an interrupted run. What it measured on the same model and text "
    "is kept; to measure again, delete OUTPUT.work.",
)
@debug_option
def run(
    recipe: str,
    model: str | None,
    output: str | None,
    calibrate: tuple[str, ...],
    text: tuple[str, ...],
    tasks: str | None,
    settings: tuple[str, ...],
    dry_run: bool,
    overwrite: bool,
    fresh: bool,
    debug: bool,
) -> None:
    """Carry out RECIPE, a YAML file or the name of a ready recipe.

    Finished layers are kept beside the output; the same command continues an interrupted run.
    """
    from moe_compress.pipeline import plan_run, read_calibration
    from moe_compress.pipeline import run as run_recipe

    from .own_text import of_the_demo, with_text
    from .show import show_forecast, show_result

    short = {"model": model, "output": output, "evaluate.tasks": tasks and tasks.split(",")}
    # Quoted, as settings are YAML: a folder may be called 5, or 2026-01-31.
    changes = _settings(settings) | {key: json.dumps(value) for key, value in short.items() if value is not None}
    checked = with_text(recipe, changes, calibrate, text)
    if (said := of_the_demo(checked, recipe)) is not None:
        _say(said)
    if dry_run:
        opened, forecast = plan_run(checked)
        draft, _ = read_calibration(checked, opened, forecast.passes)
        show_forecast(checked, opened, forecast, draft)
        return
    show_result(run_recipe(checked, overwrite=overwrite, fresh=fresh))


@main.command()
@click.argument("model")
@click.option(
    "--calibrate", multiple=True, metavar="TEXT", help="Also run this text, a file, folder or glob; repeatable."
)
@click.option("--sequences", type=click.IntRange(1), default=32, show_default=True, help="Sequences of that text.")
@click.option("--length", type=click.IntRange(2), help="Tokens of a sequence; default: 512, or what the model reads.")
@click.option(
    "--segment", type=click.IntRange(1), default=16, show_default=True, help="Tokens of a segment (SRP, SCH)."
)
@click.option("--plots", type=click.Path(file_okay=False), help="Write PNG files to this folder.")
@click.option("--traces", type=click.Path(dir_okay=False), help="Write every routing decision to this .safetensors.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@debug_option
def inspect(
    model: str,
    calibrate: tuple[str, ...],
    sequences: int,
    length: int | None,
    segment: int,
    plots: str | None,
    traces: str | None,
    as_json: bool,
    debug: bool,
) -> None:
    """Show what the checkpoint MODEL holds: family, layers, experts, sizes. Nothing is loaded.

    With --calibrate also what its routing does on text, one layer in memory: load, super experts, activations,
    co-activation, certainty, local consistency (docs/analysis.md).
    """
    from .show import inspected, show_inspection

    if not calibrate and (plots or traces):
        raise click.UsageError("--plots and --traces need text: add --calibrate TEXT")
    found = inspected(model)
    if not as_json:
        show_inspection(found)
    if calibrate:
        from .show_analysis import analysed, show_analysis

        routing = analysed(model, calibrate, sequences, length, segment, plots, traces)
        found["routing"] = routing
        if not as_json:
            show_analysis(routing)
    if as_json:
        click.echo(json.dumps(found, indent=2))


@main.command()
@click.argument("model")
@click.option(
    "--calibrate", multiple=True, required=True, metavar="TEXT", help="Text file, folder or glob; repeatable."
)
@click.option("--domain-field", default="domain", show_default=True, help="Field of its rows that holds the domain.")
@click.option("--criterion", default="easy_ep", show_default=True, help="How experts are scored, as in prune.experts.")
@click.option(
    "--keep", type=float, default=0.5, show_default=True, help="Share of the experts that a task's model keeps."
)
@click.option("--sequences", type=click.IntRange(1), default=96, show_default=True, help="Sequences of all domains.")
@click.option("--length", type=click.IntRange(2), help="Tokens of a sequence; default: 512, or what the model reads.")
@click.option("--output", type=click.Path(dir_okay=False), help="File to write; default: MODEL/domains.safetensors.")
@debug_option
def domains(model: str, debug: bool, **wanted: Any) -> None:
    """Find out which experts of the checkpoint MODEL matter for which domain of text, and write it to one file.

    Then `moe_compress.load(MODEL, task="python")`, or a prompt for a task, loads those experts only (docs/domains.md).
    """
    from .show_analysis import find_domains, show_domains

    show_domains(*find_domains(model, **wanted))


@main.command()
@click.argument("model")
@click.option("--against", help="The original: KL divergence and agreement are measured against it.")
@click.option("--text", multiple=True, help="Text file, folder or glob; repeatable.")
@click.option("--length", type=int, help="Tokens of one window; default: 2048, or what the model reads.")
@click.option("--max-tokens", type=int, help="Tokens of each file at the most.")
@click.option("--tasks", help="lm-eval tasks, separated by commas.")
@click.option("--task-path", type=click.Path(), help="Folder with lm-eval task files of your own.")
@click.option("--limit", type=int, help="Items of each task at the most.")
@click.option("--generation", type=int, help="Prompts from --text to continue greedily; repetitions are counted.")
@click.option("--batch-size", type=int, default=8, show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Also write the scores to a file.")
@debug_option
def evaluate(model: str, json_file: str | None, debug: bool, **wanted: Any) -> None:
    """Score the checkpoint MODEL on text and tasks, layer by layer if it doesn't fit in memory."""
    from moe_compress.checkpoint.atomic import write_json
    from moe_compress.errors import InputError

    from .show import evaluated, show_scores

    if json_file and not os.access(Path(json_file).absolute().parent, os.W_OK):
        raise InputError(f"--json {json_file} can't be written: no such folder, or no right to write there")
    scores = evaluated(model, **wanted)
    show_scores(scores)
    if json_file:
        write_json(Path(json_file), scores)


@main.command()
@click.argument("folder")
@debug_option
def verify(folder: str, debug: bool) -> None:
    """Check a checkpoint written by moe-compress: every tensor, and the logits of the loaded model."""
    from moe_compress.export.verify import verify as check
    from moe_compress.progress import Monitor
    from moe_compress.units import show_bytes

    with Monitor().stage("verify") as progress:
        result = check(Path(folder), progress)
    click.echo(
        f"{folder}: {result.tensors} tensors ({show_bytes(result.bytes)}) as written; {result.loader}; "
        f"logits within {result.distance:.2g} of their spread (allowed {result.tolerance:g})"
    )


@main.command()
@click.argument("name", required=False)
@debug_option
def passes(name: str | None, debug: bool) -> None:
    """List the passes and targets, or explain the pass NAME and its options."""
    from .show import show_pass, show_passes

    if name is None:
        show_passes()
    else:
        show_pass(name)


@main.command()
@debug_option
def families(debug: bool) -> None:
    """List the model families of the installed transformers: supported, or why not."""
    from .show import show_families

    show_families()


@main.command()
@click.argument("name", required=False)
@debug_option
def recipes(name: str | None, debug: bool) -> None:
    """List the ready recipes, or print the recipe NAME."""
    from moe_compress.recipes import find_recipe, ready_recipes

    if name is not None:
        click.echo(find_recipe(name).read_text(encoding="utf-8"), nl=False)
        return
    for path, summary in ready_recipes().items():
        click.echo(f"{path:<28} {summary}")
    click.echo("\nmoe-compress run NAME --model MODEL --output OUT --calibrate TEXT --text TEXT")
