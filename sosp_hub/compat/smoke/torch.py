"""Smoke tests of `sosp_hub.compat.torch`."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from sosp_hub.compat import torch as compat
from sosp_hub.compat.smoke import expect, smoke


@smoke("trace without data; MACs of a checkpoint that was not loaded")
def fake_mode() -> None:
    with compat.FakeMode() as mode:
        made = nn.Linear(3, 5)(torch.empty(2, 3))
    taken = mode.from_tensor(torch.ones(4))
    for tensor, shape in ((made, (2, 5)), (taken, (4,))):
        expect(type(tensor).__name__ == "FakeTensor", f"a {type(tensor).__name__} holds data")
        expect(tuple(tensor.shape) == shape, f"shape {tuple(tensor.shape)}, not {shape}")
    expect(compat.FAKE_LOG.startswith("torch."), compat.FAKE_LOG)


@smoke("trace and MACs of mixtures of experts")
def grouped_products() -> None:
    for packet in compat.grouped_product_flops():
        with compat.FakeMode():
            ends = torch.empty(2, dtype=torch.int32)
            made = packet(torch.empty(8, 6), torch.empty(2, 6, 5), ends)
        expect(tuple(made.shape) == (8, 5), f"shape {tuple(made.shape)}")


@smoke("trace and the verification of every cut")
def dispatch_mode() -> None:
    class Names(compat.DispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
            seen.append((func.namespace, str(func)))
            return func(*args, **(kwargs or {}))

    seen: list[tuple[str, str]] = []
    with torch.no_grad(), Names():
        nn.Linear(3, 5)(torch.zeros(2, 3))
    expect(("aten", "aten.addmm.default") in seen, f"a linear layer is {seen}")


@smoke("trace: what is known of each tensor")
def tensor_table() -> None:
    table, tensor, other = compat.TensorTable(), torch.zeros(2), torch.zeros(2)
    table[tensor] = "known"
    expect(tensor in table and other not in table, "tensors are told apart by their values")
    del tensor
    expect(len(table) == 0, "tensors are kept alive")


@smoke("smaller batches, and a word of advice, where memory does not suffice")
def lack_of_memory() -> None:
    try:
        torch.empty(2**60)
    except RuntimeError as error:
        expect(compat.out_of_memory(error), f"{error} is no lack of memory")
    else:
        expect(False, "more memory than there is was given")
    expect(not compat.out_of_memory(RuntimeError("shapes")), "every error is one")


@smoke("scores of models whose layers are computed again")
def recomputed_layers() -> None:
    x, calls = torch.ones(2, requires_grad=True), []

    def other_each_time(x: Tensor) -> Tensor:
        calls.append(1)
        return x.exp() if len(calls) == 1 else x[:1].exp()

    try:
        checkpoint(other_each_time, x, use_reentrant=False).sum().backward()
    except compat.RECOMPUTED_OTHERWISE:
        return
    expect(False, "another pass is not noticed")


@smoke("cutting in place: what belongs to a parameter")
def hooks_of_a_parameter() -> None:
    for register in ("register_hook", "register_post_accumulate_grad_hook"):
        parameter = nn.Parameter(torch.zeros(2))
        expect(not compat.has_hooks(parameter), "a hook is seen where there is none")
        getattr(parameter, register)(lambda _: None)
        expect(compat.has_hooks(parameter), f"{register} is not seen")


@smoke("cutting in place: what is called with a module's passes")
def hooks_of_a_module() -> None:
    for kind in ("forward_pre", "forward", "full_backward_pre", "full_backward"):
        module, called = nn.Linear(2, 2), []
        handle = getattr(module, f"register_{kind}_hook")(lambda *_, to=called: to.append(1))
        other = copy.deepcopy(module)
        for name, table in compat.hook_tables(module).items():
            expect(name in compat.hook_tables(other), f"a module has no {name}")
            vars(other)[name] = table
        other(torch.ones(1, 2, requires_grad=True)).sum().backward()
        expect(len(called) == 1, f"a {kind} hook is not called by another module")
        handle.remove()
        other(torch.ones(1, 2, requires_grad=True)).sum().backward()
        expect(len(called) == 1, f"the handle of a {kind} hook does not remove it")


@smoke("cutting in place: what is called when a module's state is saved and loaded")
def hooks_of_a_state() -> None:
    for kind in (
        "state_dict_pre",
        "state_dict_post",
        "load_state_dict_pre",
        "load_state_dict_post",
    ):
        module, called = nn.Linear(2, 2), []

        def hook(given: nn.Module, *_: object, to: list[nn.Module] = called) -> None:
            to.append(given)

        handle = getattr(module, f"register_{kind}_hook")(hook)
        other = nn.Linear(2, 2)
        for name, table in compat.hook_tables(module).items():
            for key, each in table.items():
                expect(compat.hook_inside(each) is hook, f"what a {kind} hook calls is not seen")
                table[key] = compat.hook_for(compat.hook_inside(each), each, other)
            vars(other)[name] = table
        other.load_state_dict(other.state_dict())
        expect(called == [other], f"a {kind} hook is not called with another module")
        handle.remove()
        other.load_state_dict(other.state_dict())
        expect(len(called) == 1, f"the handle of a {kind} hook does not remove it")


@smoke("cutting, saving and loading: tensors and modules are replaced where they are")
def tables_of_a_module() -> None:
    module = nn.BatchNorm1d(3)
    module.add_module("none", None)
    compat.parameter_table(module)["weight"] = nn.Parameter(torch.zeros(2))
    compat.buffer_table(module)["running_mean"] = torch.zeros(2)
    compat.child_table(module)["child"] = nn.ReLU()
    expect(module.weight.shape == (2,), "the parameter stays")
    expect(dict(module.named_buffers())["running_mean"].shape == (2,), "the buffer stays")
    expect([name for name, _ in module.named_children()] == ["child"], "the child is not there")
    expect(list(compat.child_table(module)) == ["none", "child"], "children that are None")
    compat.put_in(module, "running_var", torch.ones(2))
    expect(dict(module.named_buffers())["running_var"].shape == (2,), "the buffer stays")
    memory, weight = nn.LSTM(2, 3), nn.Parameter(torch.zeros(12, 2))
    compat.put_in(memory, "weight_ih_l0", weight)
    lists = [each for each in vars(memory).values() if isinstance(each, list)]
    held = [each for one in lists for each in one if isinstance(each, nn.Parameter)]
    expect(any(each is weight for each in held), "a recurrent layer lists its old weight")
    handle = module.register_forward_hook(print)
    expect(list(compat.forward_hook_table(module).values()) == [print], "the hook is not there")
    handle.remove()
    expect(not compat.forward_hook_table(module), "the hook stays")
    module.register_buffer("loose", torch.zeros(1), persistent=False)
    expect("loose" not in module.state_dict(), "a loose buffer is saved")
    compat.save_buffer(module, "loose")
    expect("loose" in module.state_dict(), "the buffer is not saved")


@smoke("sizes that follow from the numbers of a module; norms in training and scoring")
def classes_of_layers() -> None:
    for module in (nn.Conv1d(1, 1, 1), nn.ConvTranspose2d(1, 1, 1), nn.Conv3d(1, 1, 1)):
        expect(isinstance(module, compat.Convolution), f"{module} is no convolution")
    expect(nn.ConvTranspose1d(1, 1, 1).transposed, "transposed")
    expect(not nn.Conv1d(1, 1, 1).transposed, "not transposed")
    for module in (nn.BatchNorm1d(1), nn.BatchNorm2d(1), nn.SyncBatchNorm(1)):
        expect(isinstance(module, compat.BatchNorm), f"{module} is no batch norm")
    for module in (nn.BatchNorm3d(1), nn.InstanceNorm2d(1)):
        expect(isinstance(module, compat.RunningNorm), f"{module} keeps no statistics")
    for module in (nn.Dropout(), nn.Dropout2d(), nn.AlphaDropout()):
        expect(isinstance(module, compat.Dropout), f"{module} is no dropout")


@smoke("exact scores of models that write to what their linear layers give")
def results_that_are_no_views() -> None:
    values = torch.arange(4.0)
    own = compat.no_view(values.view(2, 2))
    expect(not own._is_view(), "it is a view")
    expect(own.data_ptr() == values.data_ptr(), "it is a copy")
    expect(own.tolist() == [[0.0, 1.0], [2.0, 3.0]], f"{own.tolist()}")


@smoke("the verification of every cut: views and operations that write")
def aliases_of_results() -> None:
    def kinds(func: object) -> list[bool | None]:
        return [alias and alias.is_write for alias in compat.result_aliases(func)]

    for func, expected in (
        (compat.aten.view.default, [False]),
        (compat.aten.add_.Tensor, [True]),
        (compat.aten.add.Tensor, [None]),
    ):
        expect(kinds(func) == expected, f"{func} gives {kinds(func)}")
        expect(compat.operation(str(func)) is func, f"{func} is not found by its name")


@smoke("verification of models whose forward pass writes to their weights")
def arguments_that_are_written() -> None:
    one, two, three = torch.ones(2), torch.ones(2), torch.ones(2)
    aten = compat.aten
    for func, args, kwargs, expected in (
        (aten.add.Tensor, (one, two), {}, []),
        (aten.clamp_.default, (one, 0), {}, [one]),
        (aten.add.out, (one, two), {"out": three}, [three]),
        (aten._foreach_add_.Scalar, ([one, two], 1), {}, [one, two]),
        (aten.embedding_renorm_.default, (one[None], two.long(), 1.0, 2.0), {}, [one[None]]),
    ):
        written = [compat.storage_key(t) for t in compat.written_arguments(func, args, kwargs)]
        expect(written == [compat.storage_key(t) for t in expected], f"{func} writes {written}")
    with compat.FakeMode() as mode:
        fake = nn.Parameter(mode.from_tensor(one))
        expect(compat.storage_key(fake) == compat.storage_key(fake.data[1:]), "views lie apart")
    expect(compat.storage_key(one) != compat.storage_key(two), "tensors lie in one storage")
    sparse = torch.eye(2).to_sparse()
    expect(compat.storage_key(sparse) == compat.storage_key(sparse), "sparse tensors have no key")


@smoke("leaving tensors that a model shares with others as they were")
def writes_to_a_tensor() -> None:
    tensor = torch.zeros(2, 2)
    before = compat.num_writes(tensor)
    tensor[0].add_(1)
    expect(compat.num_writes(tensor) > before, "a write through a view is not counted")


@smoke("scoring and training of compiled models")
def compiled_models() -> None:
    model = nn.Linear(1, 1)
    expect(compat.compiled_from(torch.compile(model)) is model, "a compiled model hides its own")
    expect(compat.compiled_from(model) is None, "a plain model is compiled")
    compiled: Any = torch.compile(model)
    wrapped = torch.compile(nn.DataParallel(compiled))
    expect(compat.unwrapped(wrapped) is model, "a model for several devices hides its own")
    expect(hasattr(fsdp, compat.SHARDED), f"there is no {compat.SHARDED}")


@smoke("fine-tuning with FSDP2, twice in one run")
def models_that_were_sharded() -> None:
    mine = dist.is_available() and not dist.is_initialized()
    if mine:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, mesh = nn.Linear(2, 2), init_device_mesh("cpu", (dist.get_world_size(),))
        plain, kind = set(vars(model)), type(model)
        expect(not compat.is_sharded(model), "a plain model is sharded")
        for _ in range(2):
            kept = dict(compat.parameter_table(model))
            tables = {name: dict(table) for name, table in compat.hook_tables(model).items()}
            fsdp.fully_shard(model, mesh=mesh)
            expect(compat.is_sharded(model), "a sharded model is plain")
            compat.forget_sharding(model)
            model.__class__ = kind
            for name in vars(model).keys() - plain:
                del vars(model)[name]
            compat.parameter_table(model).update(kept)
            for name, table in compat.hook_tables(model).items():
                table.clear()
                table.update(tables[name])
        expect(not compat.is_sharded(model), "a model that was sharded still is")
        expect(model(torch.ones(1, 2)).shape == (1, 2), "it computes nothing")
    finally:
        if mine:
            dist.destroy_process_group()


@smoke("trace, scores and verification of compiled models and of models with compiled parts")
def compiled_models_run_as_written() -> None:
    seen: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:  # noqa: ARG001
        seen.append(graph)
        return graph

    model = torch.compile(nn.Linear(1, 1), backend=backend)
    with compat.eagerly():
        model(torch.zeros(1, 1))
    expect(not seen, "a compiled module was compiled all the same")


@smoke("second-order scores of attention")
def softmax_below_autograd() -> None:
    scores = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    shares = torch.softmax(scores, -1)
    grad = torch.randn_like(shares)
    (expected,) = torch.autograd.grad(shares, scores, grad)
    given = compat.softmax_backward(grad, shares.detach())
    expect(torch.equal(given, expected), "another gradient than autograd's")
    masked = compat.safe_softmax(torch.full((1, 2), -torch.inf))
    expect(torch.equal(masked, torch.zeros(1, 2)), f"an empty row gives {masked.tolist()}")


@smoke("second-order scores of convolutions, norms and activations")
def operations_below_autograd() -> None:
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(x.shape, dtype=torch.float64)
    aten = compat.aten
    stats = aten.native_layer_norm(x.detach(), [5], None, None, 1e-5)[1:]
    mask = [True, False, False]
    for name, function, backward in (
        ("relu", F.relu, lambda x: aten.threshold_backward(grad, x, 0)),
        ("relu6", F.relu6, lambda x: aten.hardtanh_backward(grad, x, 0, 6)),
        ("gelu", F.gelu, lambda x: aten.gelu_backward(grad, x)),
        ("silu", F.silu, lambda x: aten.silu_backward(grad, x)),
        (
            "layer norm",
            lambda x: F.layer_norm(x, (5,)),
            lambda x: aten.native_layer_norm_backward(grad, x, [5], *stats, None, None, mask)[0],
        ),
        (
            "convolution",
            lambda x: F.conv2d(x, _KERNEL, padding=1),
            lambda x: aten.convolution_backward(
                grad, x, _KERNEL, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask
            )[0],
        ),
    ):
        (expected,) = torch.autograd.grad(function(x), x, grad)
        error = (backward(x.detach()) - expected).abs().max()
        expect(error < 1e-12, f"{name}: a gradient that is off by {error:.1e}")


_KERNEL = torch.linspace(-1, 1, 4 * 4 * 3 * 3, dtype=torch.float64).reshape(4, 4, 3, 3)


@smoke("noticing optimizers of parameters that apply_ replaced")
def steps_of_optimizers() -> None:
    seen: list[Any] = []
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    handle = compat.after_steps(lambda stepped, *_: seen.append(stepped))
    try:
        optimizer.step()
    finally:
        handle.remove()
    optimizer.step()
    expect(len(seen) == 1 and seen[0] is optimizer, f"{len(seen)} steps were seen, of one")


@smoke("what code has noted on a parameter")
def marks_of_parameters() -> None:
    old, new = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    old._no_weight_decay, old._like, old._size = True, torch.zeros(1), 2  # pyright: ignore
    new._size = 1  # pyright: ignore
    noted = vars(compat.with_marks(new, old))
    expect(noted == {"_no_weight_decay": True, "_size": 1}, f"{noted} was taken over")


@smoke("refusing to cut quantised weights")
def packed_weights() -> None:
    class Packed(nn.Parameter):
        """As torchao and bitsandbytes make them: a parameter of a class of their own."""

    Packed.__module__ = "torchao.quantization"
    model = nn.Linear(2, 2)
    expect(compat.packed_weight(model) is None, "a plain weight is taken for a packed one")
    model.weight = Packed(torch.zeros(2, 2))
    expect(type(model.weight) is Packed, "a module does not keep the class of a parameter")
    expect("weight" in str(compat.packed_weight(model)), "a packed weight is not seen")
