//! Driver memory: SET_MEM_TABLE, ADD_MEM_REG and REM_MEM_REG, and what stands in the window for it.
//!
//! On each change: map what is new, tell the back-end, and when it has agreed unmap what is old. A change that fails leaves
//! the table before in force. What is mapped is read from the window itself, so that a change cut short by the end of a
//! back-end leaves nothing behind that the next change does not know of.

use std::os::fd::OwnedFd;
use std::rc::Rc;

use vvu_protocol::address::WindowOffset;
use vvu_protocol::control::Handle;
use vvu_protocol::memory::{MAX_SLOTS, MAX_TABLE_REGIONS, MemoryError, MemoryRegion, check_table};
use vvu_protocol::message::FrontEndRequest;
use vvu_protocol::window::{Area, Plan, RegionOfFile, Span, WindowError};

use super::SessionError;
use super::device_state::{Descriptor, is_same_region};
use super::relay::{Answer, Relay};
use crate::appliance::{ApplianceError, file_identity};
use crate::translate;

type Table = [(MemoryRegion, Descriptor)];

/// Why a change of driver memory was refused; the session goes on with the table before.
#[derive(Debug, thiserror::Error)]
enum TableError {
    #[error("regions")]
    Table(#[from] MemoryError),
    #[error("regions do not fit the window")]
    Window(#[from] WindowError),
    #[error("file of a region")]
    File(#[source] ApplianceError),
    #[error("window")]
    Map(#[source] ApplianceError),
    #[error("no region of {size:#x} bytes at guest address {address:#x}")]
    NoRegion { address: u64, size: u64 },
    #[error("the back-end answered {0}")]
    BackEnd(u64),
}

/// A change that stays possible after a failure.
type Attempt<T, E> = Result<Result<T, E>, SessionError>;

impl Relay<'_> {
    pub(super) async fn set_memory(&mut self, table: &Table) -> Result<Answer, SessionError> {
        let changed = self.change_memory(table, MAX_TABLE_REGIONS, |plan| vec![whole_table(table, plan)]).await?;
        Ok(self.answer_change("memory table", changed))
    }

    pub(super) async fn add_region(
        &mut self,
        region: &MemoryRegion,
        file: &Descriptor,
    ) -> Result<Answer, SessionError> {
        let mut table = self.session.state.regions().to_vec();
        table.push((*region, Rc::clone(file)));
        let tell =
            |plan: &Plan| plan.offsets.last().map(|at| translate::added_region(region, *at)).into_iter().collect();
        let changed = self.change_memory(&table, MAX_SLOTS, tell).await?;
        Ok(self.answer_change("memory region", changed))
    }

    pub(super) async fn remove_region(&mut self, region: &MemoryRegion) -> Result<Answer, SessionError> {
        let known = self.session.state.regions();
        let Some(gone) = known.iter().position(|(known, _)| is_same_region(known, region)) else {
            let (address, size) = (region.guest_address.0, region.size);
            return Ok(self.refuse("memory region", TableError::NoRegion { address, size }));
        };
        let mut table = known.to_vec();
        let before = plan_table(self, &table);
        let (known, _) = table.remove(gone);
        let place = before.ok().and_then(|plan| plan.offsets.get(gone).copied()).unwrap_or(WindowOffset(0));
        let tell = |_: &Plan| vec![translate::removed_region(&known, place)];
        let changed = self.change_memory(&table, MAX_SLOTS, tell).await?;
        Ok(self.answer_change("memory region", changed))
    }

    /// Brings a new back-end to the memory of the front-end.
    pub(super) async fn replay_memory(&mut self) -> Result<Answer, SessionError> {
        let table = self.session.state.regions().to_vec();
        let tell = |plan: &Plan| {
            let (first, later) = table.split_at(table.len().min(MAX_TABLE_REGIONS));
            let later_offsets = plan.offsets.iter().skip(first.len());
            let added = later.iter().zip(later_offsets).map(|((region, _), at)| translate::added_region(region, *at));
            [whole_table(first, plan)].into_iter().chain(added).collect()
        };
        let changed = self.change_memory(&table, MAX_SLOTS, tell).await?;
        Ok(self.answer_change("memory table", changed))
    }

    fn answer_change(&self, what: &'static str, changed: Result<usize, TableError>) -> Answer {
        match changed {
            Ok(files) => {
                tracing::debug!(session = self.session.number, files, "driver memory is in the window");
                Answer::Acknowledgement(0)
            }
            Err(error) => self.refuse(what, error),
        }
    }

    /// Puts `table` in force, with the requests of `tell` in between. Answers how many pieces are mapped.
    async fn change_memory(
        &mut self,
        table: &Table,
        limit: usize,
        tell: impl FnOnce(&Plan) -> Vec<FrontEndRequest<Handle>>,
    ) -> Attempt<usize, TableError> {
        let regions: Vec<MemoryRegion> = table.iter().map(|(region, _)| *region).collect();
        let plan = match check_table(&regions, limit).map_err(TableError::from).and_then(|()| plan_table(self, table)) {
            Ok(plan) => plan,
            Err(error) => return Ok(Err(error)),
        };
        if let Err((mapped, error)) = self.map_new(&plan, table).await? {
            self.unmap(plan.map.get(..mapped).unwrap_or_default()).await?;
            return Ok(Err(TableError::Map(error)));
        }
        for request in tell(&plan) {
            let value = self.ask_acknowledgement(request).await?;
            if value != 0 {
                self.unmap(&plan.map).await?;
                return Ok(Err(TableError::BackEnd(value)));
            }
        }
        self.unmap(&plan.unmap).await?;
        self.appliance.layout.commit(&plan);
        Ok(Ok(plan.spans.len()))
    }

    /// Maps the plan's new spans. The inner error says how many had been mapped when the appliance's VMM refused one.
    async fn map_new(&mut self, plan: &Plan, table: &Table) -> Attempt<(), (usize, ApplianceError)> {
        for (index, span) in plan.map.iter().enumerate() {
            let files = table.iter().map(|(_, file)| file);
            let mut of_span = files.filter(|file| file_identity(file).is_ok_and(|(id, _)| id == span.file));
            let Some(file) = of_span.next() else { continue };
            if let Err(error) = self.map(span, file).await? {
                return Ok(Err((index, error)));
            }
        }
        Ok(Ok(()))
    }

    /// Maps a span of `file`. The inner error is a refusal of the appliance's VMM.
    pub(super) async fn map(&mut self, span: &Span, file: &OwnedFd) -> Attempt<(), ApplianceError> {
        let what = "duplicate of a file for the window";
        let file = file.try_clone().map_err(|source| ApplianceError::Io { what, source })?;
        let Self { session, appliance } = self;
        match session.link.meanwhile(&mut appliance.control, appliance.window.map(span, file)).await? {
            Ok(()) => Ok(Ok(())),
            Err(ApplianceError::Reset) => Err(SessionError::WindowLost),
            Err(error @ ApplianceError::Refused { .. }) => Ok(Err(error)),
            Err(error) => Err(error.into()),
        }
    }

    pub(super) async fn unmap(&mut self, spans: &[Span]) -> Result<(), SessionError> {
        let Self { session, appliance } = self;
        for span in spans {
            match session.link.meanwhile(&mut appliance.control, appliance.window.unmap(span)).await? {
                Ok(()) => {}
                Err(ApplianceError::Reset) => return Err(SessionError::WindowLost),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Maps the pieces of one buffer, as far as they are not mapped already. If one is refused, the area is as before.
    pub(super) async fn map_buffer(&mut self, pieces: &[(Span, &OwnedFd)]) -> Attempt<(), ApplianceError> {
        let mut mapped: Vec<Span> = Vec::new();
        for (span, file) in pieces {
            if self.appliance.window.mapped().contains(span) {
                continue;
            }
            if let Err(error) = self.map(span, file).await? {
                self.unmap(&mapped).await?;
                return Ok(Err(error));
            }
            mapped.push(*span);
        }
        Ok(Ok(()))
    }

    /// What is mapped in an area.
    pub(super) fn mapped_in(&self, area: Area) -> Vec<Span> {
        self.appliance.window.mapped().iter().filter(|span| area.holds(span)).copied().collect()
    }

    /// Unmaps everything of an area but these pieces.
    pub(super) async fn keep_only(&mut self, area: Area, pieces: &[Span]) -> Result<(), SessionError> {
        let mut old = self.mapped_in(area);
        old.retain(|span| !pieces.contains(span));
        self.unmap(&old).await
    }
}

fn plan_table(relay: &mut Relay<'_>, table: &Table) -> Result<Plan, TableError> {
    let entries = table.iter().map(|(region, file)| {
        let (file, file_len) = file_identity(file).map_err(TableError::File)?;
        Ok(RegionOfFile { region: *region, file, file_len })
    });
    let entries = entries.collect::<Result<Vec<_>, TableError>>()?;
    let appliance = &mut *relay.appliance;
    appliance.layout.adopt(appliance.window.mapped());
    Ok(appliance.layout.plan(&entries)?)
}

fn whole_table(table: &Table, plan: &Plan) -> FrontEndRequest<Handle> {
    let regions: Vec<MemoryRegion> = table.iter().map(|(region, _)| *region).collect();
    translate::memory_table(&regions, &plan.offsets)
}
