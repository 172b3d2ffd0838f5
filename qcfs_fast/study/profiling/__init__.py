"""profiling: what `qcfs_fast.profile` measures and how it shows it. Each file imports only those above it.

    record.py    the figures of a profile, what each means, and how it is written as text
    synapses.py  how many synapses a spike reaches
    page.py      a record as an HTML page
    report.py    Profile: a record that writes itself as a table, JSON or HTML
    measure.py   profile(): runs the network and fills a Profile

The folder is not called `profile`, because a subpackage of that name would hide the function `qcfs_fast.profile`.
"""
