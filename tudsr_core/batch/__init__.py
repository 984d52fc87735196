"""Folders of pictures: which file becomes which, what is done already, and the run that survives being stopped.

Knows upscalers only as something that plans and runs.

Must not know: networks, weight files, consoles, ComfyUI.
"""

from .._lazy import public_names

__all__, __getattr__ = public_names(
    __name__,
    blocks="BlockPlan plan_blocks upscale_in_blocks",
    dispatch="run_on_workers",
    folders="pictures_under plan_jobs",
    hot_folder="HotFolder",
    jobs="Job OpenJob Output Work open_job",
    manifest="MANIFEST Manifest State open_manifest",
    ledger="Listener Outcome Summary Together explain",
    pipeline="run_jobs",
    ray_workers="ray_crew",
    report="Report",
    settings="describe_run",
)
