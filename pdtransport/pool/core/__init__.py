"""The chunks themselves: the store, its memory, who may write and read, what goes when memory is short."""
