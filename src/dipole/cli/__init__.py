"""The command line: one module per command, with a docstring (summary, examples), dataclass `Args` and `run(args)`."""

from __future__ import annotations

import importlib
import keyword
import sys
from types import ModuleType

from dipole.errors import DipoleError, unknown

COMMANDS = {
    "demo": "from nothing to an evaluated policy and a report, in minutes",
    "collect": "collect demonstrations with a scripted expert",
    "inspect": "look at a dataset: counts, ranges, defects",
    "train": "train a diffusion or flow policy on demonstrations",
    "finetune": "improve a policy by reinforcement learning",
    "eval": "evaluate a policy on unseen seeds, with intervals",
    "compare": "compare two policies on the same seeds",
    "compose": "mix the scores of policies at test time, with the weights searched",
    "accelerate": "find the fastest way to run a policy that keeps its success",
    "distill": "condense a policy to one or two network calls per chunk",
    "serve": "serve policies to robots over the network",
    "limits": "find the limits a dataset's actions keep, for the guard",
    "report": "write a run's report page",
    "reproduce": "rerun a published claim: baseline against method",
    "import": "take over a policy of LeRobot, diffusion_policy or robomimic",
    "export": "write a policy for a robot without dipole (ONNX, torch.export, AOTInductor), or for LeRobot",
    "push": "publish a policy on the Hugging Face Hub, with a model card",
    "pull": "fetch a policy from the Hugging Face Hub",
    "convert": "turn datasets and checkpoints of other frameworks into plain files",
    "systems": "list the published systems and their results",
    "bench": "measure dipole against its peers",
    "env": "list environments",
}


def usage() -> str:
    """Return the overview printed by `dipole --help`."""
    width = max(len(name) for name in COMMANDS)
    lines = [f"  {name.ljust(width)}  {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "usage: dipole COMMAND [OPTIONS]      (dipole COMMAND --help for options and examples)",
            "",
            "Diffusion and flow policies: learning and execution.",
            "",
            *lines,
            "",
            "examples:",
            "  dipole demo",
            "  dipole collect metaworld/peg-insert-side-v3 --episodes 60 --noise 0.1 --out runs/demos",
            "  dipole train --data runs/demos --out runs/peg",
            "  dipole eval runs/peg --env metaworld/peg-insert-side-v3 --episodes 50",
        ]
    )


def _command(name: str) -> ModuleType:
    if name not in COMMANDS:
        raise unknown("command", name, COMMANDS)
    # `import` is a word of Python's own: its module is called `import_`.
    return importlib.import_module(f"dipole.cli.{name}{'_' if keyword.iskeyword(name) else ''}")


def _parse(module: ModuleType, name: str, words: list[str]) -> object:
    import tyro

    return tyro.cli(module.Args, prog=f"dipole {name}", description=module.__doc__, args=words)


def main(argv: list[str] | None = None) -> None:
    """Run the command line; exits with 2 and one line on stderr when the input is at fault, 130 on Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return
    if words[0] in ("-V", "--version"):
        from dipole import __version__

        print(__version__)
        return
    try:
        module = _command(words[0])
        module.run(_parse(module, words[0], words[1:]))
    except DipoleError as error:
        print(f"dipole: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("dipole: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        # The reader of our output (head, a pager) went away: not an error of ours.
        sys.stderr.close()
        raise SystemExit(0) from None
