"""Which golden cases are checked, and which wait for their model: those are skipped by name, not in silence."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden.support import cases

CHECKED = {
    "test_albef.py": ("albef-pretrain", "albef-retrieval", "albef-posembed", "blip-posembed"),
    "test_answers.py": ("albef-vqa", "blip-vqa"),
    "test_albef_heads.py": ("albef-ve", "albef-nlvr"),
    "test_blip_heads.py": ("blip-nlvr",),
    "test_blip.py": ("blip-pretrain", "blip-retrieval", "blip-itm", "blip-caption"),
    "test_textclean.py": ("albef-textclean", "blip-textclean"),
    "test_clip.py": ("clip-vit", "clip-resnet"),
    "test_clip_tokenizer.py": ("clip-tokenizer",),
    "test_vlmo.py": ("vlmo-pretrain", "vlmo-textmlm", "vlmo-irtr"),
    "test_vlmo_heads.py": ("vlmo-vqa", "vlmo-nlvr2"),
    "test_vlmo_files.py": ("vlmo-train", "vlmo-relpos", "vlmo-abspos", "vlmo-from-beit"),
    "test_openclip.py": ("openclip-",),
    "test_coca.py": ("coca-",),
    "test_beit_masks.py": ("beit-mask",),
    "test_beit.py": ("beit-mim",),
    "test_beit3.py": ("beit3-",),
    "test_vilt.py": ("vilt-",),
}
WAITING: dict[str, str] = {}


@pytest.mark.parametrize("path", cases(""), ids=lambda p: p.name)
def test_case_is_known(path: Path) -> None:
    checked = [file for file, prefixes in CHECKED.items() if path.name.startswith(prefixes)]
    if checked:
        assert (Path(__file__).parent / checked[0]).is_file()
        return
    missing = [model for prefix, model in WAITING.items() if path.name.startswith(prefix)]
    assert missing, f"{path.name}: no test and no known model; is it a new kind of case?"
    pytest.skip(f"not built yet: {missing[0]}")
