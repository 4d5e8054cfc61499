"""Loss, gradients and statistics of a batch from one forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lrkfac.core.base.arguments import check_flag, check_model
from lrkfac.core.base.processes import processes_of
from lrkfac.core.base.replicas import check_same
from lrkfac.core.base.types import Tree
from lrkfac.core.evaluation.estimators import Estimator, check_estimator
from lrkfac.core.evaluation.evaluate import Evaluator
from lrkfac.core.evaluation.objective import Objective
from lrkfac.core.evaluation.parts import Parts
from lrkfac.core.layers.description import Layers, check_layers
from lrkfac.core.likelihoods.joint import Joint, check_likelihood, joint
from lrkfac.core.likelihoods.protocol import Likelihood


def evaluator(
    model: Callable[[Tree, Tree], Any],
    likelihood: Likelihood | Joint,
    layers: Layers,
    estimator: Estimator = "mc",
    samples: int = 1,
    has_aux: bool = False,
    thin: bool = False,
    differentiable: bool = False,
    group: Any = None,
    scatter: bool = False,
) -> Evaluator:
    """Return the function that evaluates a batch: loss, gradients and statistics for K-FAC.

    The output gradients ``g`` that enter ``B`` are, term by term,

    * ``"mc"``: those at targets drawn from the model, ``samples`` times: an unbiased estimate of the Fisher;
    * ``"exact"``: the columns of the square root of the output Hessian: the expectation itself. Where outputs of one
      example depend on others, as with BatchNorm in training mode, or several terms of an example stand along the
      leading axis of the outputs (``print(layers)`` says so), each term gets a random sign: an unbiased estimate;
    * ``"empirical"``: those at the true targets, at no extra cost, but not the Fisher (Kunstner, Balles &
      Hennig 2019, arXiv 1905.12558); where an example has several terms, they add up before they are squared,
      weights of terms and heads included;
    * ``"forward_only"``: none, ``B = I``, also at no extra cost (Benzing 2022, arXiv 2201.12250); only for Kronecker
      structures. Scales and shifts, which have no ``A``, then pass as plain gradients.

    Args:
        model: Pure function ``model(params, inputs)``.
        likelihood: The likelihood of its outputs; ``joint(...)`` where they are a tree. Of a dictionary, dataclass or
            similar container with the entry ``logits``, a single one takes that entry.
        layers: From ``find_layers``.
        estimator: As above.
        samples: Draws per term for ``"mc"``.
        has_aux: Whether the model returns ``(outputs, aux)``.
        thin: Whether the gradient of a linear layer's weight becomes a ``LazyMatrix`` where its rows hold at most half
            as many numbers, ``2 n (d_in + d_out) <= d_in d_out`` for ``n`` rows. Off by default because
            ``evaluation.grads`` reach the user, and torch's functions take no ``LazyMatrix``; ``LowRankKFAC``, which
            hands none out, has it on. ``lrkfac.materialize`` makes tensors of them, as does the end of a chain.
        differentiable: Whether autograd records an evaluation, so ``backward()`` goes through a step to parameters
            that require gradients. By default it does not: a loop over such parameters, as ``named_parameters()`` and
            ``torch.func.stack_module_state`` give them, keeps no graph of its past steps. The transformations of
            ``torch.func`` differentiate either way.
        group: The processes that share the work: a ``torch.distributed.ProcessGroup``, or a ``DeviceMesh`` with one
            axis. Each evaluates its part of a joint batch; parts may differ in size, and be empty. Loss, gradients,
            Fisher products and the weight are those of the joint batch, and so is what transformations make of them.
            All processes call the same functions in the same order, at equal parameters. Before
            ``init_process_group()``, ``torch.distributed.group.WORLD`` is ``None``, which means one process.
            ``outputs`` and ``aux``, such as BatchNorm's statistics, are those of the part.
        scatter: Whether gradients of covered parameters stay parts, one on each process, which
            ``precondition_by_fisher(..., owners=group)`` sums where their owner is: half of what it costs to sum them
            everywhere. It must be the first to see them; of others only ``clip_by_kl`` takes such gradients.
            ``lrkfac.materialize`` sums them.

    Returns:
        ``evaluate(params, inputs, targets, statistics=True, layers=None, examples=None, noise=None)``, which returns
        an ``Evaluation``; see ``Evaluator.__call__``. It can be copied and pickled where ``model`` and ``likelihood``
        can.

    Raises:
        ValueError: If an option is unknown or out of range, ``scatter`` without a group, or ``differentiable`` with
            ``layers.autograd``; on all processes, if layers or options differ.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch, lrkfac
        >>> model, params = lrkfac.from_module(torch.nn.Linear(3, 2))
        >>> inputs, targets = torch.randn(8, 3), torch.randint(2, (8,))
        >>> layers = lrkfac.find_layers(model, params, inputs)
        >>> evaluate = lrkfac.evaluator(model, lrkfac.categorical(), layers)
        >>> evaluate(params, inputs, targets, statistics=False).grads["weight"].shape
        torch.Size([2, 3])

        Statistics of a random quarter of the examples:

        >>> evaluation = evaluate(params, inputs, targets, examples=torch.randperm(8)[:2])
        >>> [uses[0].shape for uses in evaluation.statistics.inputs.values()]
        [torch.Size([2, 3])]
    """
    check_model(model)
    check_layers(layers)
    check_flag(has_aux, "has_aux")
    check_flag(thin, "thin")
    check_flag(differentiable, "differentiable")
    check_flag(scatter, "scatter")
    if scatter and group is None:
        raise ValueError("scatter: expected a group whose processes have the parts of gradients, got none; pass group=")
    if differentiable and layers.autograd:
        raise ValueError(
            "differentiable: expected False for a model whose derivatives are taken by torch.autograd, since it does "
            "what torch.func refuses (it calls torch.autograd.grad, or a torch.autograd.Function without "
            "setup_context); use torch.func.grad and setup_context in the model"
        )
    check_estimator(estimator, samples)
    check_likelihood(likelihood)
    heads = likelihood if isinstance(likelihood, Joint) else joint(likelihood)
    parts = None
    if group is not None:
        processes = processes_of(group)
        scattered = layers.covered if scatter and processes.size > 1 else frozenset()
        parts = Parts(processes, len(heads.heads), scattered)
        options: dict[str, Any] = {"estimator": estimator, "samples": samples, "thin": thin, "scatter": scatter}
        options |= {"differentiable": differentiable, "likelihood": [head.facts() for head in heads.heads]}
        options |= {"weights of heads": heads.weights}
        check_same("evaluator", parts.processes.exchange({**options, **layers.facts()}))
        heads = replace(heads, part=True)
    return Evaluator(Objective(model, heads, has_aux), layers, estimator, samples, thin, differentiable, parts)
