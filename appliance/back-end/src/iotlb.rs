//! What the front-end has told of the driver VM's IOMMU.
