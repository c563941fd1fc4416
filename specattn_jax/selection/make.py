"""From a policy to the class that carries it out."""

from __future__ import annotations

from specattn_kernels import Implementation

from specattn_jax.models.config import ModelConfig
from specattn_jax.selection.alignment import Alignment, NucleusMass
from specattn_jax.selection.mixture import Mixture
from specattn_jax.selection.policy import SelectionPolicy
from specattn_jax.selection.published import Published

DraftedSelection = Mixture | Published


def make_selection(
    policy: SelectionPolicy,
    alignment: Alignment,
    mass: NucleusMass,
    target: ModelConfig,
    draft: ModelConfig,
    implementation: Implementation | None = None,
) -> DraftedSelection:
    """The selection of a policy for one model pair.

    Args:
        policy: the ingredients.
        alignment: how draft attention predicts target attention. Of sources that are not kv heads it cannot be told
            what the draft should read, so that it reads everything then.
        mass: how much attention mass each target layer keeps.
        target: shape of the target.
        draft: shape of the draft.
        implementation: backend of the selection ops; None lets the library choose.
    """
    kind: type[Mixture] | type[Published] = Published if policy.prediction == "layer_map" else Mixture
    if alignment.granularity != "kv_head":
        policy = policy.with_draft_reads(1.0)
    return kind(alignment, mass, policy, target, draft, implementation)
