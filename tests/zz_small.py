import torch, sys
import torch.distributed as dist
from ring_cases import *
from longspan.pattern import LongNet, SDA
CASES=[Case(LongNet((8,32,96),(1,2,4)),97,torch.float64), Case(LongNet((16,64),(1,4)),61,torch.float64,heads=(6,3),changed=("alibi","sinks")), Case(SDA(3,rows="selected"),50,torch.float64,heads=(4,1)),Case(LongNet((12,96),(2,3),causal=False),97,torch.float64)]
def job(rank,truths):
    sys.modules["longspan.ring.plan"].SIZE = 4
    wrong=[]
    ranks=dist.get_world_size(); n=0
    for case,truth in zip(CASES,torch.load(truths)):
        for layout in LAYOUTS:
            for strategy in (None,*ring.STRATEGIES):
                l=layout(case.length,ranks)
                p=settled(case.pattern,l,case.heads,case.widths,8,strategy); n+=len(p.threads)
                wrong+=[f"{case.pattern} {l} {strategy}: {f}" for f in faults(rank,case,truth,l,strategy)]
    return wrong[:6],n
