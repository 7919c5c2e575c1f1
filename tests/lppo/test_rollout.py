"""Rollouts: answers of a group side by side, each with a draw of its own that no neighbour can move."""

from __future__ import annotations

from exitsafe.engine.vlm import VLM
from exitsafe.lppo.rollout import rollout
from exitsafe.records import Sample
from tests.lppo.conftest import tiny_config
from tests.lppo.test_policy import rows_at


def test_repeated_places_have_draws_of_their_own_that_depend_on_nothing_else(vlm: VLM, samples: list[Sample]) -> None:
    config = tiny_config(batch_size=9, group_size=3, seed=5)
    one, other = rows_at(vlm, samples[1:3], [3, 5])
    places = [one, one, one, other, other, other, one]
    asked = [samples[1]] * 3 + [samples[2]] * 3 + [samples[1]]
    answers = rollout(vlm, asked, places, config=config, draw=4)
    for place, repetition in enumerate((0, 1, 2, 0, 1, 2, 3)):
        [(_, alone)] = vlm.complete(
            [places[place]],
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            seed=5,
            batch_size=1,
            draw=4 * len(places) + repetition,
            suppress=vlm.special_token_ids,
        )
        assert answers[place].token_ids.tolist() == list(alone.token_ids)
        assert answers[place].row is places[place]
        assert answers[place].sample is asked[place]
    assert len({tuple(answer.token_ids.tolist()) for answer in answers}) > 2
