"""study: what looks on at a converted network. It profiles, compares, evaluates and demonstrates; it computes no spike.

    profiling/       qcfs_fast.profile: rates, synaptic operations, energy and time by layer, as data, table or HTML
    benchmark/       latencies beside the ANN and the usual simulators, and the one timing harness (measure.py)
    data.py          images from a folder or an .npz file
    spikes.py        two figures of traced spikes
    zoo.py           networks by name or from a checkpoint
    evaluation.py    accuracy by T on a data set, in one or several processes, interruptible
    demo.py          the whole journey on real scans
    command_line.py  the command qcfs-fast

This is the top floor. Its modules may import any other package; none of those imports study, except `qcfs_fast`
itself, which exports `profile` and `Profile`, and `__main__`.
"""
