"""Where a model comes from: every kind of reference becomes one :class:`onecard.models.model.Model`."""
