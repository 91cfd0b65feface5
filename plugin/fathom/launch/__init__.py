"""Starting a recipe on the hosts of a slice, or as several processes here: `fathom launch`.

`plan.py` says what is started on a cluster and checks it. Each target is a file: `local.py`, `jobset.py`, `xpk.py`,
`tpu_vm.py`.
"""
