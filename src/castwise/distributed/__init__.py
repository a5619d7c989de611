"""The policy in DDP and FSDP2 words: several processes compute what one would.

    cw.shard(model, policy)               FSDP2: groups of weights by their formats
    ddp = cw.replicate(model, policy)     DDP: gradients summed as the policy says

    formats.py       how the weights of one module are held, sent and summed
    groups.py        which modules share one message: the groups of FSDP2
    sharding.py      puts the groups on a model
    replication.py   sums gradients in the formats of a policy under DDP
    compression.py   makes gradients smaller; low_rank.py is the one that needs a memory
    gradients.py     what all processes must agree on before a step
    roll_call.py     who is there, and whether all mean the same run
    likeness.py      whether all still hold the same bits (fingerprint.py)
    ranks.py         the processes that torchrun started

`shard` comes first of all, then the optimizer, then the policy by `prepare`, Lightning
or `apply_policy`; `replicate` comes last. Islands, operator table and contract are as
in one process. Nothing is imported here: FSDP2 takes a second to load.
"""
