"""`imglish eval`: measure a checkpoint on image-caption pairs; the tasks are in :mod:`imglish.cli.evaluate_tasks`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imglish.cli import evaluate_answers, evaluate_suite, evaluate_tasks
from imglish.cli.source_options import add_source_options, source_config
from imglish.cli.writing import add_options, generation_config

if TYPE_CHECKING:
    from imglish.data.errors import Errors
    from imglish.data.records import Record
    from imglish.data.sources import Needs

DESCRIPTION = """\
Measure retrieval by towers and, where the model has a fusion tower, reranked by it.

  imglish eval retrieval --model runs/flickr8k/model --data captions.jsonl --images photos --split val --rerank 32
  torchrun --nproc-per-node 8 -m imglish eval retrieval --model ... --data ...

Prints the tables; writes retrieval.json and report.html (tables, examples with pictures) to the folder --out.
"""

CAPTIONING = """\
Write a caption for every picture and compare it with the captions that the data hold: BLEU, ROUGE-L, CIDEr-D.

  imglish eval captioning --model runs/flickr8k-blip/model --data captions.jsonl --images photos --split val

Prints the table; writes predictions.jsonl (while it runs), captioning.json and report.html (pictures with captions) to
the folder --out.
"""


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("imglish eval", description="Measure a checkpoint.")
    jobs = parser.add_subparsers(dest="job", required=True, metavar="JOB")
    retrieval = jobs.add_parser(
        "retrieval",
        help="text→image, image→text, image→image, text→text",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_source(retrieval)
    captioning = jobs.add_parser(
        "captioning",
        help="captions against references: BLEU, ROUGE-L, CIDEr-D",
        description=CAPTIONING,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_source(captioning)
    captioning.add_argument("--batch", type=int, default=16, help="pictures at a time (default: 16)")
    captioning.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    captioning.add_argument("--out", default="eval-out", help="folder of the results (default: eval-out)")
    captioning.add_argument("--java", default="", metavar="meteor,spice", help="further metrics (extra: captions)")
    captioning.add_argument("--judge", metavar="MODEL", help="model that says how well captions fit their pictures")
    add_options(captioning, many=False)
    evaluate_tasks.add_jobs(jobs)
    evaluate_answers.add_jobs(jobs)
    evaluate_suite.add_job(jobs)
    add = retrieval.add_argument
    add("--rerank", type=int, default=32, metavar="K", help="candidates that the fusion scores, 0: none (default: 32)")
    add("--all-pairs", action="store_true", help="the fusion scores every pair (small sets)")
    add("--regions", metavar="FILE", help="regions of the pictures, for a model that reads these (docs/models.md)")
    add("--sweep", type=_numbers, default=(), metavar="4,8,16", help="also report these smaller k")
    add("--ks", type=_numbers, default=(1, 5, 10), metavar="1,5,10", help="which R@k (default: 1,5,10)")
    add("--score-rule", choices=("itm", "itm_probability", "itm+itc"), help="default: as the checkpoint says")
    add("--clean", choices=("albef", "blip", "none"), help="clean-up of captions (default: as the model was trained)")
    add("--max-words", type=int, help="of a caption, with --clean (default: as the model was trained)")
    add("--ties", choices=("pessimistic", "optimistic", "stable_reversed"), default="pessimistic")
    add("--batch", type=int, default=64, help="pictures that pass the tower at a time (default: 64)")
    add("--pairs", type=int, default=512, help="pairs that pass the fusion at a time (default: 512)")
    add("--precision", choices=("float32", "bfloat16"), default="float32")
    add("--token-dtype", choices=("float32", "bfloat16"), default="float32", help="of image tokens kept for reranking")
    add(
        "--token-memory",
        type=float,
        default=8.0,
        metavar="GIB",
        help="of them in memory, the rest on disk (default: 8)",
    )
    add("--out", default="eval-out", help="folder for retrieval.json and report.html (default: eval-out)")
    return parser


def _add_source(parser: argparse.ArgumentParser) -> None:
    """Which model, which data, which device."""
    add = parser.add_argument
    add("--model", required=True, help="folder of an exported model")
    add("--data", required=True, help="file, folder or URL of pictures and captions, of any layout (docs/data.md)")
    add_source_options(parser)
    add("--limit", type=int, help="only the first so many pictures")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")


def main(argv: Sequence[str]) -> int:
    """Status: 0 done, 1 a picture or the disk failed, 2 wrong arguments, model or data."""
    arguments = _parser().parse_args(argv)

    from imglish.atomic import require_writable
    from imglish.checkpoints.native import CheckpointError
    from imglish.data.images import ImageError
    from imglish.models.capabilities import MissingCapabilityError
    from imglish.training.settings import SettingsError

    try:
        require_writable(Path(arguments.out))
        return _JOBS[arguments.job](arguments)
    except (CheckpointError, MissingCapabilityError, SettingsError, FileNotFoundError, ValueError) as error:
        print(f"imglish eval: {error}", file=sys.stderr)
        return 1 if isinstance(error, ImageError) else 2
    except OSError as error:
        print(f"imglish eval: {error}", file=sys.stderr)
        return 1


def _retrieval(arguments: argparse.Namespace) -> int:
    from imglish.checkpoints.native import load
    from imglish.data.regions import RegionFile, region_loader
    from imglish.evaluation.encoding import Machine
    from imglish.evaluation.retrieval import RetrievalConfig, evaluate_retrieval
    from imglish.evaluation.summary import retrieval_report
    from imglish.objectives.gather import rank
    from imglish.training.ranks import pick_device, process_group

    device = pick_device(arguments.device)
    loaded = load(arguments.model)
    rule: Any = arguments.score_rule or loaded.score_rule
    towers_only = rule == "itc"
    config = RetrievalConfig(
        rerank=0 if towers_only else arguments.rerank,
        all_pairs=arguments.all_pairs and not towers_only,
        sweep=arguments.sweep,
        ks=arguments.ks,
        ties=arguments.ties,
        score_rule="itm" if towers_only else rule,
        machine=Machine(
            image_block=arguments.batch,
            pair_block=arguments.pairs,
            precision=arguments.precision,
            token_dtype=arguments.token_dtype,
            token_memory=int(arguments.token_memory * 2**30),
        ),
    )
    with process_group(device):
        records, errors = _records(arguments)
        records = _cleaned(records, arguments, loaded.meta)
        load_picture = region_loader(RegionFile(arguments.regions)) if arguments.regions else None
        model = loaded.model.to(device)
        result = evaluate_retrieval(model, loaded.tokenizer, records, config, load_picture, errors=errors)
        first = rank() == 0
    if first:
        print(result.text())
        out = Path(arguments.out)
        facts = {"model": arguments.model, "data": arguments.data, "split": arguments.split or "all"}
        report = retrieval_report(result, records, "Retrieval", facts)
        path = report.save(out / "report.html")
        (out / "retrieval.json").write_text(result.to_json() + "\n", encoding="utf-8")
        print(f"report: {path}")
    return 0


def _captioning(arguments: argparse.Namespace) -> int:
    from imglish.checkpoints.native import load
    from imglish.evaluation.caption_report import captioning_report
    from imglish.evaluation.captions import CaptioningConfig, evaluate_captioning
    from imglish.evaluation.encoding import Machine
    from imglish.evaluation.java_metrics import JAVA_METRICS
    from imglish.evaluation.judging import Judge
    from imglish.objectives.gather import rank
    from imglish.training.ranks import pick_device, process_group

    java: Any = tuple(name for name in arguments.java.split(",") if name)
    if unknown := sorted(set(java) - set(JAVA_METRICS)):
        raise ValueError(f"--java {','.join(unknown)}: choose of {', '.join(JAVA_METRICS)}")
    config = CaptioningConfig(
        generation_config(arguments),
        prompt=arguments.prompt,
        machine=Machine(image_block=arguments.batch, precision=arguments.precision),
        java=java,
    )
    device = pick_device(arguments.device)
    judge = None if arguments.judge is None else Judge.load(arguments.judge, device)
    loaded = load(arguments.model)
    out = Path(arguments.out)
    with process_group(device):
        records, errors = _records(arguments)
        model = loaded.model.to(device)
        result = evaluate_captioning(
            model, loaded.tokenizer, records, config, predictions=out / "predictions.jsonl", errors=errors, judge=judge
        )
        first = rank() == 0
    if first:
        print(result.text())
        facts = {"model": arguments.model, "data": arguments.data, "split": arguments.split or "all"}
        path = captioning_report(result, records, "Captioning", facts).save(out / "report.html")
        (out / "captioning.json").write_text(result.to_json() + "\n", encoding="utf-8")
        print(f"report: {path}")
    return 0


def _cleaned(records: Sequence[Record], arguments: argparse.Namespace, meta: dict[str, Any]) -> Sequence[Record]:
    """With the captions as the model was trained on them, or as the options say."""
    from imglish.data.text import clean_record

    trained = meta.get("recipe", {}).get("data", {})
    style = arguments.clean or trained.get("clean", "none")
    most = arguments.max_words or trained.get("max_words", 30)
    return records if style == "none" else [clean_record(record, most, style) for record in records]


def _records(arguments: argparse.Namespace) -> tuple[Sequence[Record], Errors]:
    """The records, and the place for those that turn out to be unusable: ``errors.csv`` in the folder of results."""
    from imglish.data.errors import FILE, Errors
    from imglish.data.sources import open_source
    from imglish.objectives.gather import rank

    file = Path(arguments.out) / FILE if rank() == 0 else None
    needs: Needs = "names" if getattr(arguments, "regions", None) else "pairs"
    records = open_source(source_config(arguments, arguments.data, needs), errors_file=file)
    return records[: arguments.limit], Errors(arguments.max_errors, file)


_JOBS: dict[str, Callable[[argparse.Namespace], int]] = {
    "retrieval": _retrieval,
    "captioning": _captioning,
    "compositional": evaluate_tasks.compositional,
    "zeroshot": evaluate_tasks.zeroshot,
    "linear-probe": evaluate_tasks.linear_probe,
    "grounding": evaluate_tasks.grounding,
    **dict.fromkeys(evaluate_answers.TASKS, evaluate_answers.answers),
    "suite": lambda arguments: evaluate_suite.suite(arguments, _parser().parse_args, _JOBS),
}
