"""The two models of the course."""

import pytest
import torch
from torch import nn

from course_lib.models import GPT, MLP, next_token_loss, parameter_count


def test_an_mlp_has_a_linear_layer_for_each_pair_of_widths() -> None:
    model = MLP(64, 32, 16, 10)
    shapes = [tuple(layer.weight.shape) for layer in model if isinstance(layer, nn.Linear)]
    assert shapes == [(32, 64), (16, 32), (10, 16)]
    assert isinstance(model[-1], nn.Linear)


def test_an_mlp_of_one_width_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match="input and an output width"):
        MLP(64)


def test_a_gpt_gives_a_score_for_each_token_of_the_vocabulary() -> None:
    gpt = GPT(50, context=16, width=32, heads=4, depth=2)
    assert gpt(torch.zeros(3, 16, dtype=torch.int64)).shape == (3, 16, 50)


def test_a_gpt_sees_nothing_of_later_tokens() -> None:
    torch.manual_seed(0)
    gpt = GPT(50, context=16, width=32, heads=4, depth=2)
    tokens = torch.randint(50, (1, 16))
    changed = tokens.clone()
    changed[0, 10:] = 7
    before, after = gpt(tokens), gpt(changed)
    assert torch.allclose(before[0, :10], after[0, :10], atol=1e-6)
    assert not torch.allclose(before[0, 10:], after[0, 10:], atol=1e-3)


def test_a_tied_gpt_shares_its_embedding_with_its_head() -> None:
    tied, untied = GPT(50, tied=True), GPT(50, tied=False)
    assert tied[-1].linear.weight is tied[0].token.weight
    assert parameter_count(untied) - parameter_count(tied) == 50 * 64


def test_a_width_that_the_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="3 heads do not divide a width of 64"):
        GPT(50, width=64, heads=3)


def test_an_untrained_gpt_guesses_among_all_tokens() -> None:
    torch.manual_seed(0)
    gpt = GPT(74)
    tokens, targets = torch.randint(74, (2, 4, 64))
    loss = next_token_loss(gpt(tokens), targets).item()
    assert loss == pytest.approx(torch.log(torch.tensor(74.0)).item(), abs=0.1)


def test_slices_of_a_model_make_the_whole_model() -> None:
    torch.manual_seed(0)
    gpt = GPT(50, depth=3, tied=False)
    tokens = torch.randint(50, (2, 64))
    layers = list(gpt)
    first, second = nn.Sequential(*layers[:2]), nn.Sequential(*layers[2:])
    assert torch.equal(second(first(tokens)), gpt(tokens))
