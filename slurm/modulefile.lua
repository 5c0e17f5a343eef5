-- Module of pipedream-hpc for Lmod. @PREFIX@: the virtual environment that holds it; @VERSION@: its version.
-- Filled in and installed as README.md beside this file says.

whatis("Name: pipedream-hpc")
whatis("Version: @VERSION@")
whatis("Description: PipeDream as an MPI runtime: pipeline-parallel training with 1F1B and weight stashing")

help([[
Gives the command pipedream, and the Python whose programs can import pipedream_hpc.
Start with: pipedream --help
]])

conflict("pipedream-hpc")
-- The MPI it was built with; leave this out if the environment has one of its own.
-- depends_on("openmpi")

setenv("PIPEDREAM_HPC_ROOT", "@PREFIX@")
prepend_path("PATH", "@PREFIX@/bin")
