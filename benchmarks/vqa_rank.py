"""Ranked VQA: the best of 3,000 candidate answers, in the official order of work and in ours, same weights.

    python -m benchmarks.vqa_rank --threads 2

Official order (ALBEF's and BLIP's ``rank_answer``): the first word of every candidate, the 128 most probable ones
padded to the longest candidate of the list, the question's states repeated for each of them, their keys and values
projected for each, logits over the vocabulary at every position. Ours: keys and values once a question, beginnings
that candidates share once, no padding, logits where a token is asked for. Both rank the same 128 by the same
log-probabilities, which is checked. The decoder has the published size (12 layers of BLIP; ALBEF has --layers 6);
weights are random; answers have the lengths of VQA v2's list (most have one word, the longest eight tokens). Question
and picture are encoded before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.common import arguments, machine, measure, milliseconds, table
from imglish.data.batch import TextBatch
from imglish.models.aligned import look
from imglish.models.answering import AnswerDecoder, RankRule
from imglish.models.blip import BlipConfig
from imglish.nn.segments import Ragged, Segments

SEP = 102
VOCABULARY = 30524


def candidates(count: int) -> list[list[int]]:
    """Different answers of one to six words whose first words repeat, as the words of real answers do."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([0.71, 0.17, 0.07, 0.03, 0.01, 0.01]).multinomial(4 * count, True, generator=generator) + 1
    found: dict[tuple[int, ...], None] = {(1000, 1001, 1002, 1003, 1004, 1005, 1006): None}
    for length in lengths.tolist():
        first = 1000 + int(2500 * float(torch.rand((), generator=generator)) ** 2)
        rest = torch.randint(1000, 3500, (length - 1,), generator=generator).tolist()
        found.setdefault((first, *rest))
        if len(found) == count:
            break
    return [[*answer, SEP] for answer in found]


def official(decoder: AnswerDecoder, questions: Ragged, answers: list[list[int]], shortlist: int) -> Tensor:
    """Scores ``(Q, shortlist)``, best first, by padded sequences and repeated states. The attention is PyTorch's fused
    one here too, so that the order of work alone is compared."""
    count, length = len(questions), max(map(len, answers))
    padded = torch.tensor([[decoder.start, *answer, *[0] * (length - len(answer))] for answer in answers])
    memory = questions.rows.unflatten(0, (count, -1))

    def logits(ids: Tensor, states: Tensor) -> Tensor:
        segments = Segments.equal(*ids.shape)
        rows = decoder.embedding(TextBatch(ids.flatten(), segments))
        kept = Ragged(states.flatten(0, 1), Segments.equal(*states.shape[:2]))
        out = look(decoder.layers, rows, segments, decoder.project(kept), Segments.equal(len(ids), 1), causal=True)
        return decoder.logits(out).unflatten(0, ids.shape)

    first = logits(padded[:1, :1].repeat(count, 1), memory)[:, 0].log_softmax(1)
    # of answers with the same first word those that stand first, as here; topk's choice among them is arbitrary
    chosen = first[:, padded[:, 1]].sort(dim=1, descending=True, stable=True).indices[:, :shortlist]
    ids = padded[chosen.flatten()]
    found = logits(ids, memory.repeat_interleave(shortlist, 0))[:, :-1].float().log_softmax(2)
    targets = ids[:, 1:]
    each = found.gather(2, targets[:, :, None])[:, :, 0] * (targets != 0)
    return each.sum(1).view(count, shortlist).sort(dim=1, descending=True).values


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(repeats=3)
    parser.add_argument("--questions", type=int, default=2)
    parser.add_argument("--words", type=int, default=12, help="tokens of a question")
    parser.add_argument("--candidates", type=int, default=3000)
    parser.add_argument("--shortlist", type=int, default=128)
    parser.add_argument("--layers", type=int, default=12)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    decoder = AnswerDecoder(BlipConfig(vocab_size=VOCABULARY), given.layers, VOCABULARY - 2, types=0).eval()
    answers = candidates(given.candidates)
    questions = Ragged(torch.randn(given.questions * given.words, 768), Segments.equal(given.questions, given.words))
    rule = RankRule(given.shortlist)
    contenders = {
        "official order of work": lambda: official(decoder, questions, answers, given.shortlist),
        "imglish": lambda: decoder.rank(questions, answers, rule, given.shortlist),
    }
    with torch.no_grad():
        theirs = official(decoder, questions, answers, given.shortlist)
        ours = torch.from_numpy(decoder.rank(questions, answers, rule, given.shortlist)[1]).float()
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
        found = measure(contenders, given.repeats, "cpu", peaks=False)
    base = found["official order of work"].seconds
    rows = [
        [name, milliseconds(one.seconds / given.questions), f"{base / one.seconds:.1f} x"]
        for name, one in found.items()
    ]
    print(machine("cpu"))
    print(table(["", "a question", "faster"], rows))


if __name__ == "__main__":
    main()
