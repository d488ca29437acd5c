//! pontoon-qualify
