//! The dirty log: which pages of the driver VM's memory the back-end has written, while that VM migrates.
