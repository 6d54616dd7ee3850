"""Process groups and meshes of the caller: used, left alone, or refused."""

import pytest
import ranks
import torch
import torch.distributed as dist
from bare import Bare, loop
from refusals import assert_refused, attempt
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import asyncdiff_fast
from asyncdiff_fast import patching


def _start_group(rank, world_size):
    dist.init_process_group("gloo", rank=rank, world_size=world_size)


def _own_group(rank, use_mesh):
    _start_group(rank, 2)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("stage",)) if use_mesh else None
    model, pictures = Bare(), []
    for _ in range(3):
        asyncdiff_fast.patch(model, mesh=mesh, num_stages=2, warmup_steps=2, timeout_s=30)
        pictures.append(loop(model))
        asyncdiff_fast.unpatch(model)
    assert dist.is_initialized()
    total = torch.tensor([rank + 1])
    dist.all_reduce(total)
    dist.destroy_process_group()
    return pictures, int(total)


@pytest.mark.parametrize("use_mesh", [False, True])
def test_group_of_the_caller_stays(use_mesh):
    by_rank = ranks.run(2, _own_group, use_mesh)
    first = by_rank[0][0][0]
    assert all(total == 3 and all(torch.equal(p, first) for p in pictures) for pictures, total in by_rank)


def _part_of_the_ranks(rank):
    _start_group(rank, 3)
    mesh = DeviceMesh("cpu", [0, 2], mesh_dim_names=("stage",))
    model, picture = Bare(), None
    if rank != 1:
        asyncdiff_fast.patch(model, mesh=mesh, num_stages=2, warmup_steps=2, timeout_s=30)
        picture = loop(model)
        asyncdiff_fast.unpatch(model)
        outside = None
    else:
        outside = attempt(model, mesh=mesh, num_stages=2)
    dist.barrier()
    wrong = attempt(model, mesh=init_device_mesh("cpu", (3, 1), mesh_dim_names=("a", "b")), num_stages=2)
    dist.barrier()
    sizes = attempt(model, mesh=init_device_mesh("cpu", (3, 1), mesh_dim_names=("stage", "cfg")), num_stages=2)
    dist.barrier()
    dist.destroy_process_group()
    return picture, outside, wrong, sizes


def test_mesh_over_two_of_three_ranks():
    results = ranks.run(3, _part_of_the_ranks)
    assert torch.equal(results[0][0], results[2][0])
    assert_refused([results[1][1]], "mesh", "rank 1")
    assert_refused([wrong for _, _, wrong, _ in results], "mesh", "stage")
    assert_refused([sizes for _, _, _, sizes in results], "mesh", "'stage': 2", "'stage': 3")


def _mesh_of_patches_and_stages(rank):
    """The ranks of a mesh whose dimensions are named in another order than ours."""
    _start_group(rank, 4)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "patch"))
    config = asyncdiff_fast.Config(num_patches=2, num_stages=2)
    found = patching._ranks(mesh, config)
    runtime = asyncdiff_fast.patch(Bare(), mesh=mesh, num_patches=2, num_stages=2, timeout_s=30)
    along = {axis: runtime._parts.along(axis) for axis in ("patch", "stage")}
    asyncdiff_fast.unpatch(runtime.denoiser)
    dist.barrier()
    dist.destroy_process_group()
    return found, along


def test_a_mesh_may_name_its_dimensions_in_any_order():
    for rank, (found, along) in enumerate(ranks.run(4, _mesh_of_patches_and_stages)):
        assert found == [0, 2, 1, 3]
        assert along["stage"] == [rank % 2, rank % 2 + 2] and along["patch"] == [rank - rank % 2, rank - rank % 2 + 1]
