"""Plan -> model: loaded, with its adapter, merged; and what names one."""
