"""The laboratory: what reproduces the papers. The rest of svdtune works without it, and never
imports it.

Its parts add what they have to the registries of the rest when they are imported, which
`svdtune.registry` does where a name is asked for: tasks, data (data sets, prompts, row formats),
baselines, gates, harness and cli.
"""
