"""study: what trains networks and looks on at converted ones: profiles, comparisons, studies. It computes no spike.

    profiling/       qcfs_fast.profile: rates, synaptic operations, energy and time by layer, as data, table or HTML
    benchmark/       latencies beside the ANN and the usual simulators, and the one timing harness (measure.py)
    data.py          images in memory, from a folder or an .npz file; datasets.py: sets by name
    networks.py      the paper's networks for small images; zoo.py: torchvision's, and the authors' checkpoints
    training.py      the paper's recipe as a loop; trained.py: the file that it leaves
    evaluation.py    accuracy by T on a data set, in one or several processes, interruptible
    sweep.py         the command study: a trained network by T, mode and bits; sweep_page.py: its table, plots, page
    spikes.py        two figures of traced spikes
    html.py          what pages share
    demo.py          the whole journey on real scans; shipped.py: a trained network and images that come along
    command_line/    the command qcfs-fast

This is the top floor. Its modules may import any other package; none of those imports study, except `qcfs_fast`
itself, which exports `profile`, `train` and their classes, and `__main__`.
"""
