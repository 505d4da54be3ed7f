//! The memory of a session: what the front-end has set, what the back-end has of it, and which messages lead from one to
//! the next.
//!
//! Front-ends have many slots (ADD_MEM_REG, REM_MEM_REG), and change them often; a back-end may have no more than a table of
//! eight regions (SET_MEM_TABLE). So the front-end's list stays here, and the back-end gets it in pieces as large as can be
//! ([`crate::regions`]). Often enough nothing changes by that.
//!
//! - As long as no vring runs, one SET_MEM_TABLE says it all, if eight regions are enough.
//! - While vrings run, requests are under way in memory that the back-end has mapped. If it has memory slots, what stays is
//!   not touched: new pieces are added beside it. Else it gets a table, which replaces the one before in one step.
//! - More than eight pieces need memory slots. Only here a piece of which a part stays may have to be removed and its
//!   rest added again, with a moment in between.
//!
//! A front-end that replaces a region by a larger or smaller one of the same file (a PC's firmware does so) removes it first.
//! As long as another region shares a unit with it, the file stays mapped in the window, and so it does in the back-end: the
//! extents of a file that were seen stay as long as a region is in them.
//!
//! This module decides and sends nothing: [`MemoryMap::replaced`], [`MemoryMap::added`] or [`MemoryMap::removed`] gives a
//! [`Change`], each of whose steps is reported by [`MemoryMap::note_step`] when the back-end has done it, and the whole by
//! [`MemoryMap::commit`].

use vvu_protocol::address::{UserAddress, WindowOffset};
use vvu_protocol::memory::{MAX_SLOTS, MAX_TABLE_REGIONS, MemoryRegion, check_table};

use crate::regions::{Extent, RegionError, joined};

/// What a change has to take into account.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Situation<'a> {
    /// Memory slots of the back-end, if it has any.
    pub slots: Option<usize>,
    /// Whether a vring runs.
    pub running: bool,
    /// Seams of the window ([`crate::window::Window::seams`]): no piece goes over one.
    pub seams: &'a [WindowOffset],
}

/// One message to the back-end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// SET_MEM_TABLE, sorted by guest address.
    Table(Vec<Extent>),
    /// ADD_MEM_REG.
    Add(Extent),
    /// REM_MEM_REG.
    Remove(Extent),
}

/// What leads to a new list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Messages to the back-end, in this order; often none.
    pub steps: Vec<Step>,
    regions: Vec<MemoryRegion>,
    extents: Vec<Extent>,
}

/// Driver memory in one session.
#[derive(Debug)]
pub struct MemoryMap {
    window_len: u64,
    /// As the front-end has set them, with window offsets in place of file offsets.
    regions: Vec<MemoryRegion>,
    /// Each region is in one of them; each of them belongs to one file.
    extents: Vec<Extent>,
    /// What the back-end has mapped.
    back_end: Vec<Extent>,
}

impl MemoryMap {
    /// No memory, in a window of this length.
    #[must_use]
    pub const fn new(window_len: u64) -> Self {
        Self { window_len, regions: Vec::new(), extents: Vec::new(), back_end: Vec::new() }
    }

    /// Plans a new list in place of the one before.
    ///
    /// # Errors
    /// [`RegionError`] if the list is not valid, or the back-end cannot take it.
    pub fn replaced(&self, table: &[MemoryRegion], situation: Situation<'_>) -> Result<Change, RegionError> {
        check_table(table, MAX_SLOTS).map_err(RegionError::Table)?;
        self.plan(table.to_vec(), self.extents_of(table)?, situation)
    }

    /// Plans one region more.
    ///
    /// # Errors
    /// As [`MemoryMap::replaced`].
    pub fn added(&self, region: MemoryRegion, situation: Situation<'_>) -> Result<Change, RegionError> {
        let mut regions = self.regions.clone();
        regions.push(region);
        check_table(&regions, MAX_SLOTS).map_err(RegionError::Table)?;
        let mut extents = self.extents.clone();
        extents.push(Extent::new(&region, self.window_len)?);
        self.plan(regions, joined(extents, Extent::shares_unit), situation)
    }

    /// Plans one region less: the one with the same addresses and length. Its offset does not count (vhost-user specification,
    /// REM_MEM_REG: a region is told by guest address, user address and size).
    ///
    /// # Errors
    /// [`RegionError::NoSuchRegion`], else as [`MemoryMap::replaced`].
    pub fn removed(&self, region: &MemoryRegion, situation: Situation<'_>) -> Result<Change, RegionError> {
        let same = |other: &MemoryRegion| {
            (other.guest_address, other.user_address, other.size)
                == (region.guest_address, region.user_address, region.size)
        };
        let MemoryRegion { guest_address, size, user_address, .. } = *region;
        let found = self.regions.iter().position(same);
        let found = found.ok_or(RegionError::NoSuchRegion { guest_address, size, user_address })?;
        let mut regions = self.regions.clone();
        regions.remove(found);
        let exact = self.extents_of(&regions)?;
        let still_in_use = |seen: &Extent| exact.iter().any(|used| seen.holds(used));
        let extents = self.extents.iter().copied().filter(still_in_use).collect();
        self.plan(regions, extents, situation)
    }

    /// The back-end has done a step.
    pub fn note_step(&mut self, step: &Step) {
        match step {
            Step::Table(extents) => self.back_end.clone_from(extents),
            Step::Add(extent) => self.back_end.push(*extent),
            Step::Remove(extent) => self.back_end.retain(|other| other != extent),
        }
    }

    /// All steps are done: the new list holds.
    pub fn commit(&mut self, change: Change) {
        (self.regions, self.extents) = (change.regions, change.extents);
    }

    /// Where in the window `len` bytes at a user address lie, if they are in one region of the front-end.
    #[must_use]
    pub fn window_offset(&self, address: UserAddress, len: u64) -> Option<WindowOffset> {
        self.regions.iter().find_map(|region| {
            let at = address.0.checked_sub(region.user_address.0)?;
            let inside = at.checked_add(len)? <= region.size;
            inside.then_some(())?;
            WindowOffset(region.mmap_offset.0).checked_add(at)
        })
    }

    fn extents_of(&self, regions: &[MemoryRegion]) -> Result<Vec<Extent>, RegionError> {
        let extents = regions.iter().map(|region| Extent::new(region, self.window_len));
        Ok(joined(extents.collect::<Result<_, _>>()?, Extent::shares_unit))
    }

    fn plan(
        &self,
        regions: Vec<MemoryRegion>,
        extents: Vec<Extent>,
        situation: Situation<'_>,
    ) -> Result<Change, RegionError> {
        match self.steps(&extents, situation) {
            Ok(steps) => Ok(Change { steps, regions, extents }),
            Err(RegionError::Rounded(_)) => {
                // What had been kept of removed regions is in the way.
                let extents = self.extents_of(&regions)?;
                Ok(Change { steps: self.steps(&extents, situation)?, regions, extents })
            }
            Err(error) => Err(error),
        }
    }

    fn steps(&self, extents: &[Extent], situation: Situation<'_>) -> Result<Vec<Step>, RegionError> {
        let pieces = pieces(extents, situation.seams)?;
        if pieces == sorted(merged(&self.back_end, situation.seams)) {
            return Ok(Vec::new());
        }
        let Situation { slots, running, .. } = situation;
        let in_place = slots.and_then(|slots| self.in_place(extents, &pieces, slots));
        // Some back-ends take no empty table.
        let fits_table = pieces.len() <= MAX_TABLE_REGIONS && !(pieces.is_empty() && in_place.is_some());
        match in_place {
            Some(in_place) if !fits_table || running && in_place.leaves_use_alone => Ok(in_place.steps),
            _ if fits_table => Ok(vec![Step::Table(pieces)]),
            _ => Err(RegionError::TooMany { found: pieces.len(), slots: slots.unwrap_or(0) }),
        }
    }

    /// How to get there with memory slots, if there are enough of them.
    fn in_place(&self, extents: &[Extent], pieces: &[Extent], slots: usize) -> Option<InPlace> {
        let stays = |extent: &&Extent| pieces.iter().any(|piece| piece.holds(extent));
        let (kept, gone): (Vec<&Extent>, Vec<&Extent>) = self.back_end.iter().partition(stays);
        let kept: Vec<Extent> = kept.into_iter().copied().collect();
        // Each extent for itself can be removed by itself; joined, they take fewer slots.
        let missing = |wanted: &[Extent]| wanted.iter().flat_map(|extent| extent.without(&kept)).collect::<Vec<_>>();
        let added = [missing(extents), missing(pieces)].into_iter().find(|added| kept.len() + added.len() <= slots)?;
        let leaves_use_alone = gone.iter().all(|gone| !pieces.iter().any(|piece| piece.shares_unit(gone)));
        let removals = gone.into_iter().map(|gone| Step::Remove(*gone));
        Some(InPlace { steps: removals.chain(added.into_iter().map(Step::Add)).collect(), leaves_use_alone })
    }
}

/// Steps with memory slots.
struct InPlace {
    steps: Vec<Step>,
    /// No step takes away what is still wanted.
    leaves_use_alone: bool,
}

/// Extents as few pieces, sorted by guest address.
fn pieces(extents: &[Extent], seams: &[WindowOffset]) -> Result<Vec<Extent>, RegionError> {
    let pieces = sorted(merged(extents, seams));
    let regions = pieces.iter().map(Extent::region).collect::<Vec<_>>();
    check_table(&regions, MAX_SLOTS).map_err(RegionError::Rounded)?;
    Ok(pieces)
}

fn merged(extents: &[Extent], seams: &[WindowOffset]) -> Vec<Extent> {
    joined(extents.to_vec(), |one, other| one.touches(other, seams))
}

fn sorted(mut extents: Vec<Extent>) -> Vec<Extent> {
    extents.sort_unstable_by_key(|extent| extent.region().guest_address);
    extents
}

#[cfg(test)]
mod tests;
