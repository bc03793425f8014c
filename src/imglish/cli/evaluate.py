"""`imglish eval retrieval`: measure a checkpoint on image-caption pairs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Measure retrieval by towers and, where the model has a fusion tower, reranked by it.

  imglish eval retrieval --model runs/flickr8k/model --data captions.jsonl --images photos --split val --rerank 32
  torchrun --nproc-per-node 8 -m imglish eval retrieval --model ... --data ...

Prints the tables; writes retrieval.json and report.html (tables, examples with pictures) to the folder --out.
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
    add = retrieval.add_argument
    add("--model", required=True, help="folder of an exported model")
    add("--data", required=True, help="JSONL or CSV of pictures and captions")
    add("--images", help="folder that the picture paths are relative to (default: where the file lies)")
    add("--split", help="only lines with this split")
    add("--captions", help="field that holds the captions (default: captions or caption)")
    add("--limit", type=int, help="only the first so many pictures")
    add("--rerank", type=int, default=32, metavar="K", help="candidates that the fusion scores, 0: none (default: 32)")
    add("--all-pairs", action="store_true", help="the fusion scores every pair (small sets)")
    add("--sweep", type=_numbers, default=(), metavar="4,8,16", help="also report these smaller k")
    add("--ks", type=_numbers, default=(1, 5, 10), metavar="1,5,10", help="which R@k (default: 1,5,10)")
    add("--score-rule", choices=("itm", "itm_probability", "itm+itc"), help="default: as the checkpoint says")
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
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    add("--out", default="eval-out", help="folder for retrieval.json and report.html (default: eval-out)")
    return parser


def main(argv: Sequence[str]) -> int:
    """Status: 0 done, 1 a picture or the disk failed, 2 wrong arguments, model or data."""
    arguments = _parser().parse_args(argv)

    from imglish.checkpoints.native import CheckpointError
    from imglish.data.images import ImageError
    from imglish.data.records import RecordError
    from imglish.training.settings import SettingsError

    try:
        return _retrieval(arguments)
    except (CheckpointError, RecordError, SettingsError, FileNotFoundError, ValueError) as error:
        print(f"imglish eval: {error}", file=sys.stderr)
        return 1 if isinstance(error, ImageError) else 2
    except OSError as error:
        print(f"imglish eval: {error}", file=sys.stderr)
        return 1


def _retrieval(arguments: argparse.Namespace) -> int:
    from imglish.checkpoints.native import load
    from imglish.data.records import read_records
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
    captions = {} if arguments.captions is None else {"captions": arguments.captions}
    records = read_records(arguments.data, arguments.images, split=arguments.split, **captions)[: arguments.limit]
    with process_group(device):
        result = evaluate_retrieval(loaded.model.to(device), loaded.tokenizer, records, config)
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
