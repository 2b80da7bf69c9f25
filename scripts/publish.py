"""Push a finished run to the Hub in one commit: student, image processor, card, plots, records.

python scripts/publish.py outputs/cka --hub_model_id me/deit-tiny-cka [--private] [--create_pr]
python scripts/publish.py outputs/cka --dry_run

RUN is the folder of a finished run. Its optimizer state, distillation heads and checkpoints are never pushed, and no
name of a folder or token of this machine is. A dry run sends nothing: it renders all of it into RUN/hub and lists it.
The token is that of `hf auth login` or of HF_TOKEN. Exit code 5: the push failed, the run is as it was.
"""

from pathlib import Path

from hf_ihb.config.recipe import parse_run
from hf_ihb.config.run import PublishArguments
from hf_ihb.errors import DataError, RecipeError
from hf_ihb.hub import check_push, push_run, render_folder
from hf_ihb.run import run_script
from hf_ihb.runs.folder import CARD_FILE, EVALUATION_FILE, RECIPE_FILE, STAGING_FOLDER, RunFolder


def main(argv: list[str]) -> None:
    """Run folder -> a commit on the Hub, or a folder that holds what it would be."""
    run, args = parse_run(argv, PublishArguments, description=__doc__)
    if args.hub_model_id is None and not args.dry_run:
        raise RecipeError("key 'hub_model_id': expected a repo such as me/deit-tiny-cka, found nothing; or --dry_run")
    if args.output_dir is not None and not args.dry_run:
        raise RecipeError(f"key 'output_dir': expected --dry_run with it, found '{args.output_dir}' alone")
    check_push(args.hub_model_id, args.revision, args.create_pr)
    if not (folder := RunFolder(run)).is_ours or not folder.holds(EVALUATION_FILE):
        raise DataError(f"{run}: expected a finished run with {RECIPE_FILE} and {EVALUATION_FILE}, found none")
    if args.dry_run:
        render(run, args)
    else:
        push(run, args)


def render(run: Path, args: PublishArguments) -> None:
    """Writes and lists what would be pushed."""
    target = Path(args.output_dir) if args.output_dir is not None else run / STAGING_FOLDER
    names = render_folder(run, target, repo_id=args.hub_model_id, license=args.license)
    for name in names:
        print(f"{(target / name).stat().st_size:>13,} bytes  {name}")
    where = f"'{args.hub_model_id}'" if args.hub_model_id else "the repo that --hub_model_id names"
    how = "as a pull request to" if args.create_pr else f"to branch '{args.revision}' of" if args.revision else "to"
    print(f"nothing was sent; {len(names)} files would go {how} {where}; the card is {target / CARD_FILE}")


def push(run: Path, args: PublishArguments) -> None:
    """Pushes, and says where to look."""
    commit = push_run(
        run,
        args.hub_model_id,
        commit_message=args.commit_message,
        license=args.license,
        private=args.private or None,
        revision=args.revision,
        create_pr=args.create_pr,
        overwrite=args.overwrite,
    )
    print(f"{commit.commit_description or 'pushed'}: {commit.pr_url or commit.commit_url}")


if __name__ == "__main__":
    run_script(main)
