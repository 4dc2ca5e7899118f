import pytest
import torch

import tersor.models
from tersor.errors import TersorError
from tersor.models.vision.sret import fixed_permutation, soft_cross_entropy

SMALL = {
    "image_size": 32,
    "num_classes": 5,
    "base_dims": (4, 4),
    "heads": (2, 4),
    "depth": (2, 2),
    "recursive_num": (1, 1),
    "mlp_ratio": 2.0,
}


def small(**overrides):
    torch.manual_seed(0)
    return tersor.models.create("sret", **(SMALL | overrides))


def test_saves_a_shared_block_under_both_keys_and_loads_either_form():
    model = small().eval()
    image = model.example_inputs(1)["image"]
    both = model.published_state()
    assert torch.equal(both["transformers.0.blocks.0.attn.qkv.weight"], both["transformers.0.blocks.2.attn.qkv.weight"])
    for state in (both, model.state_dict()):
        again = tersor.models.load("sret", state, **SMALL)
        torch.testing.assert_close(again(image), model(image))


def test_refuses_a_checkpoint_whose_shared_block_differs_between_its_keys():
    state = small().published_state()
    state["transformers.0.blocks.2.mlp.fc1.bias"] = state["transformers.0.blocks.2.mlp.fc1.bias"] + 1
    with pytest.raises(TersorError, match=r"transformers\.0\.blocks\.0\.mlp\.fc1\.bias and transformers\.0\.blocks\.2"):
        tersor.models.load("sret", state, **SMALL)


def test_gradient_of_a_shared_block_is_the_sum_of_its_uses():
    shared = small(depth=(2, 2), recursive_num=(1, 1)).eval()
    apart = small(depth=(2, 2), recursive_num=(2, 2)).eval()  # the same computation with two blocks
    apart.load_state_dict(shared.published_state())
    image = shared.example_inputs(2)["image"]
    for model in (shared, apart):
        model(image).square().sum().backward()
    gradients = dict(apart.named_parameters())
    for rest in ("attn.qkv.weight", "mlp.fc2.bias", "coefficient3.bias"):
        one, first, second = (
            dict(shared.named_parameters())[f"transformers.1.blocks.0.{rest}"].grad,
            gradients[f"transformers.1.blocks.0.{rest}"].grad,
            gradients[f"transformers.1.blocks.2.{rest}"].grad,
        )
        torch.testing.assert_close(one, first + second)


def test_one_group_is_the_unsliced_model_whatever_the_order():
    plain, sliced = small().eval(), small(groups1=(1, 1), groups2=(1, 1)).eval()
    image = plain.example_inputs(1)["image"]
    assert torch.equal(plain(image), sliced(image))
    attention = plain.transformers[0].blocks["0"].attn
    x = torch.randn(1, 16, 8)
    torch.testing.assert_close(attention(x, 1, torch.randperm(16)), attention(x))


def test_random_shuffle_changes_eval_outputs_and_the_default_does_not():
    random = small(groups1=(1, 1), groups2=(4, 1), shuffle="random").eval()
    fixed = small(groups1=(1, 1), groups2=(4, 1)).eval()
    image = fixed.example_inputs(1)["image"]
    assert torch.equal(fixed(image), fixed(image))
    assert len({float(random(image)[0, 0].detach()) for _ in range(8)}) > 1


@pytest.mark.parametrize("n", [1, 2, 3, 4, 16, 49, 75, 784])
def test_fixed_permutation_is_one(n):
    assert fixed_permutation(n).sort().values.tolist() == list(range(n))


def test_refuses_groups_that_do_not_divide_the_tokens_and_images_of_another_size():
    with pytest.raises(TersorError, match="groups1 5"):
        small(groups1=(5, 1), groups2=(1, 1))
    with pytest.raises(TersorError, match="32 x 32 pixels, not 64 x 32"):
        small()(torch.zeros(1, 3, 64, 32))


def test_soft_loss_is_least_at_the_teachers_logits():
    teacher = torch.randn(3, 7)
    assert soft_cross_entropy(teacher, teacher) < soft_cross_entropy(teacher + torch.randn(3, 7), teacher)
