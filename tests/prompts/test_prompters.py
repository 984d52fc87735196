"""Prompters: strings of any shape, CLIP's similarity, taggers."""

from __future__ import annotations

import pytest
import torch

from tudsr_core.prompts.prompters import (
    ClipTagPrompter,
    StaticPrompter,
    TagChoice,
    TaggerPrompter,
    check_tag_space,
    choose_tags,
    prompts_from_strings,
    read_tags,
)


def quiet(done, total):
    pass


@pytest.mark.parametrize(
    "values",
    [["a", "b, c", ""], [["a", "b, c", ""]], [["a"], ["b, c", ""]], "a\nb, c\n ", ("a", ["b, c", ""])],
)
def test_strings_of_any_shape_become_one_prompt_per_tile(values):
    assert [one.text for one in prompts_from_strings(values, 3)] == ["a", "b, c", ""]


def test_one_text_serves_all_tiles_and_another_number_is_refused():
    assert [one.text for one in prompts_from_strings("a dog", 3)] == ["a dog"] * 3
    with pytest.raises(ValueError, match="2 texts for 3 tiles"):
        prompts_from_strings(["a", "b"], 3)
    with pytest.raises(ValueError, match="2 texts for 3 tiles"):
        prompts_from_strings("a\nb", 3)
    with pytest.raises(ValueError, match="0 texts for 3 tiles"):
        prompts_from_strings([], 3)
    with pytest.raises(ValueError, match="expected texts, got int"):
        prompts_from_strings([1, 2, 3], 3)


def slow_choice(images, tags, names, choice):
    """The same with plain loops and numbers."""

    def cosine(a, b):
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5

    table = [[cosine(image, tag) for tag in tags] for image in images]
    chosen = []
    for number, row in enumerate(table):
        rest = [other for index, other in enumerate(table) if index != number]
        own = [
            value - (choice.specific * sum(other[j] for other in rest) / len(rest) if rest else 0)
            for j, value in enumerate(row)
        ]
        mean = sum(own) / len(own)
        spread = (sum((value - mean) ** 2 for value in own) / len(own)) ** 0.5
        scored = sorted(((value - mean) / spread, name) for value, name in zip(own, names, strict=True))[::-1]
        chosen.append([name for score, name in scored[: choice.count] if score >= choice.least])
    return chosen


@pytest.mark.parametrize("count", [1, 2, 9])
@pytest.mark.parametrize("specific", [0.0, 0.5, 1.0])
def test_tags_are_chosen_by_standard_score_of_what_is_the_tiles_own(count, specific):
    generator = torch.Generator().manual_seed(count)
    images, tags = (torch.randn(n, 12, generator=generator) for n in (count, 40))
    choice, names = TagChoice(5, 1.0, specific), [f"tag {i}" for i in range(40)]
    made = choose_tags(images, tags, names, choice)
    wanted = slow_choice(images.double().tolist(), tags.double().tolist(), names, choice)
    assert [[name for name, _ in one.tags] for one in made] == wanted
    assert [one.text for one in made] == [", ".join(words) for words in wanted]


def test_a_word_for_the_whole_picture_gives_way_to_the_tiles_own():
    tags = torch.eye(30)
    images = torch.stack([tags[0] + 0.6 * tags[1 + i] for i in range(4)])
    names = [f"tag {i}" for i in range(30)]
    plain, own = (choose_tags(images, tags, names, TagChoice(1, 0, specific)) for specific in (0.0, 1.0))
    assert [one.text for one in plain] == ["tag 0"] * 4
    assert [one.text for one in own] == ["tag 1", "tag 2", "tag 3", "tag 4"]


def test_a_tile_where_nothing_stands_out_gets_no_words():
    tags = torch.eye(30)
    assert choose_tags(torch.ones(1, 30), tags, [str(i) for i in range(30)], TagChoice())[0].text == ""


def test_halves_of_different_clips_are_refused_with_the_pairs_that_work():
    prompter = ClipTagPrompter(["a", "b"], lambda tiles, tick: torch.rand(1, 1024), lambda: torch.rand(2, 768), "w")
    with pytest.raises(ValueError, match="768.*1024.*ViT-H-14.*SD2"):
        prompter.describe([torch.rand(3, 4, 4)], quiet)


def test_a_text_encoder_without_projection_is_refused():
    for broken in (torch.zeros(5, 8), torch.full((5, 8), float("nan")), torch.rand(1, 8).expand(5, 8)):
        with pytest.raises(ValueError, match="text projection"):
            check_tag_space(broken)
    assert check_tag_space(torch.eye(5)) is not None


def test_fingerprints_tell_settings_apart():
    made = [
        ClipTagPrompter(names, None, None, weights, choice).fingerprint()
        for names, weights, choice in (
            (["a", "b"], "w", None),
            (["ab"], "w", None),
            (["a", "b"], "v", None),
            (["a", "b"], "w", TagChoice(count=3)),
        )
    ]
    assert len(set(made)) == 4
    assert StaticPrompter("a").fingerprint() != StaticPrompter("b").fingerprint()


def test_a_tagger_sees_one_tile_at_a_time():
    class Tagger:
        def tags(self, images):
            assert images.shape[0] == 1
            return [f"{images.shape[-1]} wide"]

    ticks = []
    prompter = TaggerPrompter(Tagger(), lambda: ticks.append("ready"))
    tiles = [torch.rand(3, 5, 6), torch.rand(3, 5, 7)]
    assert [one.text for one in prompter.describe(tiles, lambda *at: ticks.append(at))] == ["6 wide", "7 wide"]
    assert ticks == ["ready", (1, 2), (2, 2)]


def test_the_shipped_list_holds_plain_words_once():
    tags = read_tags()
    assert len(tags) == len({tag.lower() for tag in tags}) > 700
    assert all("," not in tag and 1 < len(tag) < 40 for tag in tags)


def test_a_bad_list_is_named(tmp_path):
    (tmp_path / "empty.txt").write_text("# nothing\n", encoding="utf-8")
    for name in ("empty.txt", "missing.txt"):
        with pytest.raises(ValueError, match=name):
            read_tags(tmp_path / name)


def test_texts_and_tags_have_limits(tmp_path):
    deep: list = ["x"]
    for _ in range(3000):
        deep = [deep]
    for values, says in (
        (deep, "nested too deeply"),
        (["x"] * 300_000, "too many values"),
        (["x" * 5001], "a tile's prompt has 5,001"),
        (["x" * 2**22, "x"], "the tiles' texts have 4,194,305 characters"),
    ):
        with pytest.raises(ValueError, match=says):
            prompts_from_strings(values, 2)
    file = tmp_path / "tags.txt"
    for content, says in (
        ("\n".join(map(str, range(20_001))), "20,001 tags"),
        ("x" * 201, "a tag of .*tags.txt has 201 characters"),
        ("x\n" * 2**21 + "x", "more than 4,194,304 bytes"),
    ):
        file.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=says):
            read_tags(file)
