"""Several processes (torchrun, accelerate launch): what one does for all, what all agree on."""
import gc
import os

import torch.distributed as dist

def processes() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    there = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if there else (0, 1)

def anyone(wants: bool) -> bool:
    """Whether any process does. All must ask."""
    answers = [wants] * processes()[1]
    if len(answers) > 1:
        dist.all_gather_object(answers, wants)
    return any(answers)

def once(work, *args):
    """work(*args) on the first process only; what it returns or raises is every process's."""
    result = [None, None]
    if processes()[0] == 0:
        try:
            result[0] = work(*args)
        except Exception as error:                             # else the others would wait for ever
            result[1] = error
    if processes()[1] > 1:
        dist.broadcast_object_list(result)
    if result[1]:
        raise result[1]
    return result[0]

def say(*words):
    """print, once for all processes."""
    if processes()[0] == 0:
        print(*words, flush=True)

def join(cpu: bool):
    """This process joins the others, if it was started with some."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        import accelerate
        accelerate.PartialState(cpu=cpu)

def leave():
    """All wait for each other, then part."""
    if processes()[1] > 1:
        gc.collect()                                           # what holds on to the group first
        dist.barrier()
        dist.destroy_process_group()
