"""The functions of `import svdtune`: each takes a path, a model or a folder, and calls the room
that does the work. docs/api.md has them on one page."""
