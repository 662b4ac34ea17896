"""Faults of routers and experts."""

from tests.verification.mutation import Mutant

EDITS = "single edits"
ROUTER, EXPERTS = "model.moe.router", "model.moe.experts"

MIXTURES = (
    Mutant(
        "gates are not divided by their sum",
        f"{ROUTER}:weigh_experts",
        (("if mixture.gate_norm is not None and not", "if False and not"),),
        "mixture",
    ),
    Mutant(
        "what is added for the choice is left out",
        f"{ROUTER}:choose_experts",
        (("(scores + b_choice)", "(scores + 0 * b_choice)"),),
        "mixture",
    ),
    Mutant(
        "a group is as good as its best expert",
        f"{ROUTER}:choose_experts",
        (("grouped.topk(mixture.group_top, dim=-1)", "grouped.topk(1, dim=-1)"),),
        "mixture",
    ),
    Mutant(
        "an edit at hook_weights is lost",
        f"{ROUTER}:Router.forward",
        (("if edited else Routing(choice, gates)", "if False else Routing(choice, gates)"),),
        "mixture",
        EDITS,
    ),
    Mutant(
        "an expert that an edit gave a weight does not run",
        f"{EXPERTS}:Experts.forward",
        (("if routing.added is not None and", "if False and"),),
        "mixture",
        EDITS,
    ),
    Mutant(
        "experts that an edit gave a weight run for the tokens in another order",
        f"{EXPERTS}:Experts._add_others",
        (("index_add(0, groups.tokens,", "index_add(0, tokens,"),),
        "mixture",
        EDITS,
    ),
    Mutant(
        "neurons are shown in the order of the experts",
        f"{EXPERTS}:Experts.forward",
        (("torch.unflatten(groups.restore(neurons), 0", "torch.unflatten(neurons, 0"),),
        "mixture",
    ),
    Mutant(
        "an edit of neurons is lost",
        f"{EXPERTS}:Experts.forward",
        (("if changed else neurons", "if False else neurons"),),
        "mixture",
        EDITS,
    ),
    Mutant(
        "what experts make goes to other tokens",
        f"{EXPERTS}:Experts.forward",
        (("groups.restore(made)", "groups.sort(made)"),),
        "mixture",
    ),
    Mutant(
        "biases are those of other experts",
        "model.moe.groups:ExpertGroups.apply",
        (("bias.index_select(0, self.experts)", "bias.flip(0).index_select(0, self.experts)"),),
        "mixture",
    ),
    Mutant(
        "the shared expert's gate is shown, and not used",
        "model.moe.shared:SharedExpert.forward",
        (("out = self.hook_gate", "out = out + 0 * self.hook_gate"),),
        "mixture",
    ),
)
