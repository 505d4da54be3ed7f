//! Random stories that must keep the invariants.

use super::*;

/// The processes as they would be if all actions were done.
#[derive(Default)]
struct World {
    bridges: BTreeSet<PortId>,
    /// What is to be killed or asked to end, and what not.
    appliances: BTreeMap<ApplianceId, bool>,
    started: BTreeSet<ApplianceId>,
    waiting: bool,
    over: bool,
}

impl World {
    fn perform(&mut self, actions: Vec<Action>) {
        for action in actions {
            assert!(!self.over, "after the end: {action:?}");
            match action {
                Action::StartBridge(port) => {
                    assert!(self.bridges.insert(port) && self.appliances.is_empty(), "somebody still lives");
                }
                Action::StartAppliance(id) | Action::StartStandby(id) => {
                    assert!(!self.bridges.is_empty() && self.started.insert(id), "{id} is started twice or too early");
                    self.appliances.insert(id, true);
                    let wanted = self.appliances.values().filter(|wanted| **wanted).count();
                    assert!(wanted <= 2, "{wanted} appliance VMs at once");
                }
                Action::Terminate(id) | Action::Kill(id) => {
                    *self.appliances.get_mut(&id).expect("it lives") = false;
                }
                Action::KillBridge(port) => assert!(self.bridges.contains(&port)),
                Action::Answer(_) => assert!(std::mem::take(&mut self.waiting), "nobody waits for an answer"),
                Action::Progress(Progress::ActiveLost) => {}
                Action::Progress(_) | Action::AdoptImage => assert!(self.waiting),
                Action::Tell(_) => {}
                Action::End(_) => self.over = true,
            }
        }
    }
}

/// A small generator of pseudo-random numbers (xorshift64), for stories that can be told again from their seed.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u32) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        u32::try_from(self.0 >> 32).unwrap() % bound
    }

    fn port(&mut self, ports: u8) -> PortId {
        PortId(u8::try_from(self.below(u32::from(ports))).unwrap())
    }

    /// What happens next, if it can.
    fn input(&mut self, ports: u8, story: &mut Story, world: &mut World) -> Option<Input> {
        let status = [KILLED, ABORTED, EXIT_1, 0][self.below(4) as usize];
        let (port, accepted) = (self.port(ports), Accepted(self.below(12)));
        match self.below(20) {
            0..=3 => Some(Input::Listening(port)),
            4..=8 => Some(Input::Active { port, accepted, pause_us: None }),
            9 => Some(Input::Dropped(port, accepted)),
            10 => Some(Input::Ready(port)),
            11 | 12 => {
                let id = world.appliances.keys().nth(self.below(3) as usize).copied()?;
                world.appliances.remove(&id);
                Some(Input::ApplianceEnded(id, death(status)))
            }
            13 => world.bridges.remove(&port).then(|| Input::BridgeEnded(port, death(status))),
            14 | 15 if story.supervisor.may_replace().is_ok() => {
                assert!(!std::mem::replace(&mut world.waiting, true));
                Some(Input::Replace([Handover::StandBy, Handover::InTurn][self.below(2) as usize]))
            }
            16 if world.waiting => {
                world.waiting = false;
                Some(Input::ReplaceAbandoned)
            }
            _ => {
                story.now = story.supervisor.deadline()?.max(story.now);
                Some(Input::TimePassed)
            }
        }
    }
}

/// Tells the story of one seed; returns the states that it visited.
fn tell(seed: u64, ports: u8) -> BTreeSet<&'static str> {
    let mut words = BTreeSet::new();
    let mut dice = Dice(seed << 32 | 0x9e37_79b9);
    let mut story = Story::with_ports(ports, Some("20/60"));
    let mut world = World { bridges: PortId::first(ports).collect(), ..World::default() };
    for _ in 0..200 {
        let Some(input) = dice.input(ports, &mut story, &mut world) else { continue };
        let shown = format!("seed {seed}, {ports} ports: {input:?}");
        let actions = story.handle(input);
        words.insert(story.supervisor.word());
        world.perform(actions);
        let bridge_lives = !world.bridges.is_empty();
        assert!(
            world.over || bridge_lives || story.supervisor.deadline().is_some() || !world.appliances.is_empty(),
            "{shown}: nothing lives and nothing is waited for"
        );
        if world.over {
            assert!(!world.waiting, "{shown}: nobody was told of the end");
            break;
        }
    }
    words
}

#[test]
fn random_stories_keep_the_invariants() {
    for ports in 1..=3 {
        let words: BTreeSet<_> = (1..2000).flat_map(|seed| tell(seed, ports)).collect();
        assert_eq!(words.len(), 5, "not every state was visited: {words:?}");
    }
}
